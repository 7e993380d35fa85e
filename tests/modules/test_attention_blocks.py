"""Blocks of few shapes: every row once, padding only inside a block, gathers with the gradient of plain indexing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_slam.modules.attention_blocks import block_size, block_width, bounded_blocks, from_blocks, to_blocks
from nemo_slam.packing import SequenceLayout

LENGTHS = st.lists(st.integers(0, 700), max_size=14)


@pytest.mark.parametrize("limit", [3000])
def test_widths_and_sizes_are_few_and_near(limit):
    lengths = np.arange(1, limit)
    widths = np.array([block_width(int(n)) for n in lengths])
    assert (widths >= lengths).all()
    assert (widths % 16 == 0).all()
    assert len(set(widths)) <= 12
    assert (widths[lengths > 256] < 1.5 * lengths[lengths > 256]).all()
    sizes = np.array([block_size(int(n)) for n in lengths])
    assert (sizes >= lengths).all()
    assert (sizes < 1.5 * lengths + 1).all()
    assert len(set(sizes)) <= 24


@settings(deadline=None)
@given(LENGTHS, st.sampled_from([1, 16]))
def test_every_row_lies_in_one_block(lengths, multiple):
    layout = SequenceLayout.build(np.array(lengths, np.int64), multiple=multiple)
    plan = bounded_blocks(layout)
    assert plan is bounded_blocks(layout)
    seen = []
    for block in plan.blocks:
        assert block.width == block_width(block.width)
        assert block.size == block_size(block.size)
        assert block.cu_seqlens.dtype == torch.int32
        sizes = block.cu_seqlens.diff()
        assert len(sizes) == block.size
        assert (sizes >= 1).all()
        assert (sizes <= block.width).all()
        table = block.index.view(block.size, block.width)
        real = [row[:n] for row, n in zip(table, sizes, strict=True)]
        # Sequences first, then fillers of one row.
        count = sum(1 for n in lengths if n and block_width(n) == block.width)
        assert all(int(n) == 1 for n in sizes[count:])
        for row in real[:count]:
            assert (row.diff() == 1).all()
        seen += [int(i) for row in real[:count] for i in row]
    assert sorted(seen) == list(range(layout.num_valid))
    places = torch.cat([block.index for block in plan.blocks]) if plan.blocks else torch.zeros(0, dtype=torch.int64)
    assert places[plan.inverse[: layout.num_valid]].tolist() == list(range(layout.num_valid))
    assert (plan.inverse[layout.num_valid :] == len(places)).all()
    assert len({block.width for block in plan.blocks}) == len(plan.blocks)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=6).filter(any))
def test_gathers_have_the_gradient_of_plain_indexing(lengths):
    layout = SequenceLayout.build(np.array(lengths, np.int64), multiple=4)
    plan = bounded_blocks(layout)
    rows = torch.randn(layout.num_rows, 2, dtype=torch.float64, requires_grad=True)
    indices = [block.index for block in plan.blocks]
    blocks = to_blocks(rows, plan.inverse, layout.num_valid, indices)
    back = from_blocks([block.square() for block in blocks], plan.inverse, layout.num_valid)
    weight = torch.randn_like(back)
    (ours,) = torch.autograd.grad((back * weight).sum(), rows)
    valid = (torch.arange(layout.num_rows) < layout.num_valid)[:, None]
    torch.testing.assert_close(back, rows.square() * valid)
    (plain,) = torch.autograd.grad((rows.square() * valid * weight).sum(), rows)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-14)


def test_what_lies_in_the_padding_reaches_no_row():
    layout = SequenceLayout.build(np.array([3, 70]), multiple=4)
    plan = bounded_blocks(layout)
    rows = torch.randn(layout.num_rows, 2, requires_grad=True)
    blocks = to_blocks(rows, plan.inverse, layout.num_valid, [block.index for block in plan.blocks])
    torch.autograd.backward(
        blocks,
        [
            torch.full_like(block, torch.nan).index_fill(
                0,
                plan.inverse[: layout.num_valid][
                    (plan.inverse[: layout.num_valid] >= base) & (plan.inverse[: layout.num_valid] < base + len(block))
                ]
                - base,
                1.0,
            )
            for block, base in zip(blocks, np.cumsum([0, *(len(b) for b in blocks)])[:-1].tolist(), strict=True)
        ],
    )
    assert (rows.grad[: layout.num_valid] == 1).all()
    assert (rows.grad[layout.num_valid :] == 0).all()
