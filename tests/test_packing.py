"""Packing against plain Python: which row goes where, nothing lost, nothing shared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_slam.packing import MAX_BLOCK_PADDING, Segments, SequenceLayout, gather_rows, pack, ranges, row_multiple

LENGTHS = st.lists(st.integers(0, 30), max_size=12)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=8))
def test_ranges_equal_a_loop(pairs):
    starts, lengths = (np.array([p[i] for p in pairs], np.int64) for i in (0, 1))
    expected = [start + i for start, length in pairs for i in range(length)]
    assert ranges(starts, lengths).tolist() == expected


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 16))
def test_layout_rounds_up_with_a_tail(lengths, multiple):
    layout = SequenceLayout.build(np.array(lengths, np.int64), multiple=multiple)
    assert layout.num_rows % multiple == 0
    assert layout.num_rows >= 1
    assert layout.num_valid == sum(lengths)
    assert layout.num_rows - layout.num_valid < multiple + (0 if lengths and sum(lengths) else 1)
    assert layout.cu_seqlens.tolist() == np.concatenate([[0], np.cumsum([*lengths, layout.lengths[-1]])]).tolist()
    assert layout.positions[: layout.num_valid].tolist() == [i for length in lengths for i in range(length)]


@settings(deadline=None)
@given(LENGTHS)
def test_blocks_hold_every_row_once_with_little_padding(lengths):
    layout = SequenceLayout.build(np.array(lengths, np.int64), multiple=4)
    seen = []
    for block in layout.blocks:
        real = torch.ones(block.size, block.width, dtype=torch.bool) if block.mask is None else block.mask[:, 0, 0]
        rows = block.index.view(block.size, block.width)
        assert real.sum(1).tolist() == block.lengths.tolist()
        assert (~real).sum() <= MAX_BLOCK_PADDING * real.numel()
        seen += rows[real].tolist()
        for line, length in zip(rows, block.lengths, strict=True):
            assert (line[:length].diff() == 1).all()  # one sequence, in order
    assert sorted(seen) == list(range(layout.num_valid))
    places = torch.cat([block.index for block in layout.blocks]) if layout.blocks else torch.zeros(0, dtype=torch.int64)
    assert places[layout.inverse[: layout.num_valid]].tolist() == list(range(layout.num_valid))
    assert (layout.inverse[layout.num_valid :] == len(places)).all()


@settings(deadline=None)
@given(LENGTHS)
def test_positions_of_blocks_are_known_without_making_them(lengths):
    layout = SequenceLayout.build(np.array(lengths, np.int64))
    found = layout.block_positions
    assert "_attention_plan" not in vars(layout)
    assert found == sum(block.size * block.width for block in layout.blocks)


def test_rows_are_rounded_up_on_a_gpu_alone():
    assert row_multiple(128, torch.device("cuda")) == 128
    layout = SequenceLayout.build(np.array([5, 8]), multiple=row_multiple(128, torch.device("cpu")))
    assert layout.lengths.tolist() == [5, 8, 0]


@st.composite
def kinds_of_sequences(draw):
    """Kinds with 1 to 3 segments over a source of 100 rows."""
    kinds = {}
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, max_size=3)):
        count, segments = draw(st.integers(0, 5)), draw(st.integers(1, 3))
        cells = st.lists(
            st.lists(st.tuples(st.integers(0, 90), st.integers(0, 9)), min_size=segments, max_size=segments),
            min_size=count,
            max_size=count,
        )
        table = np.array(draw(cells), np.int64).reshape(count, segments, 2)
        kinds[name] = Segments(table[..., 0], table[..., 1])
    return kinds


@settings(deadline=None)
@given(kinds_of_sequences(), st.integers(1, 8))
def test_pack_equals_concatenation(kinds, multiple):
    source = torch.arange(100.0)[:, None] + 1  # no zero but the tail's
    packed = pack(kinds, 100, multiple=multiple)
    rows = gather_rows(source, packed.gather).squeeze(1)
    assert (rows[packed.layout.num_valid :] == 0).all()
    first_sequence = 0
    for name, segments in kinds.items():
        for i in range(len(segments.starts)):
            for j in range(segments.starts.shape[1]):
                start, length = segments.starts[i, j], segments.lengths[i, j]
                place = packed.starts[name][i, j]
                assert torch.equal(rows[place : place + length], source[start : start + length, 0])
                assert packed.layout.positions[place : place + length].tolist() == list(range(length))
        ids = packed.per_sequence(name, np.arange(len(segments.starts)))
        mine = ids[first_sequence : first_sequence + len(segments.starts)]
        assert sorted(mine.tolist()) == list(range(len(segments.starts)))
        totals = segments.lengths.sum(1)[mine]
        assert (np.diff(totals) >= 0).all()  # sorted by length within the kind
        assert packed.layout.lengths[first_sequence : first_sequence + len(mine)].tolist() == totals.tolist()
        assert (np.delete(ids, np.arange(first_sequence, first_sequence + len(mine))) == -1).all()
        first_sequence += len(mine)


def test_a_batch_over_the_limit_names_the_knobs():
    kinds = {"speech": Segments(np.zeros((2, 1), np.int64), np.full((2, 1), 40))}
    with pytest.raises(ValueError, match=r"80 positions \(speech: 80\).*max_positions is 64.*frames_per_step"):
        pack(kinds, 100, max_rows=64)
