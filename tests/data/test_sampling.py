"""Step-addressed sampling against a brute-force oracle."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_slam.data.sampling import StepSampler, keyed_permutation, keyed_words


def make_index(shards: list[list[int]]) -> SimpleNamespace:
    lengths = np.array([x for shard in shards for x in shard], np.int32)
    return SimpleNamespace(
        lengths=lengths,
        shard_offsets=np.concatenate([[0], np.cumsum([len(s) for s in shards])]).astype(np.int64),
        shard_lengths=np.array([sum(s) for s in shards], np.int64),
    )


def oracle_epoch(index, seed: int, purpose: int, window: int, epoch: int) -> list[int]:
    """The whole epoch's order as a Python list."""

    def permutation(n, use, block):
        words = np.random.Philox(key=[seed, purpose], counter=[0, use, epoch, block]).random_raw(n).tolist()
        return sorted(range(n), key=lambda i: (words[i], i))

    shard_ids = [list(range(a, b)) for a, b in zip(index.shard_offsets[:-1], index.shard_offsets[1:], strict=True)]
    shards = permutation(len(shard_ids), 1, 0)
    order = []
    for block in range(0, len(shards), window):
        ids = [i for s in shards[block : block + window] for i in shard_ids[s]]
        order += [ids[j] for j in permutation(len(ids), 2, block // window)]
    return order


def oracle_batches(index, seed, purpose, window, budget, steps) -> list[list[tuple[int, int]]]:
    """Batches 0..steps-1 by walking the stream from its very beginning."""
    batches = [[] for _ in range(steps)]
    position, epoch = 0, 0
    while position < steps * budget:
        for i in oracle_epoch(index, seed, purpose, window, epoch):
            if position < steps * budget:
                batches[position // budget].append((i, epoch))
            position += int(index.lengths[i])
        epoch += 1
    return batches


PINNED_PERMUTATION = [0, 1, 3, 7, 4, 6, 5, 2]
PINNED_WORDS = [16703495651723886771, 9345407262001667476]

indexes = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=9), min_size=1, max_size=7).map(make_index)


@settings(max_examples=150, deadline=None)
@given(indexes, st.integers(0, 2**63), st.integers(0, 9), st.integers(1, 8), st.integers(1, 300))
def test_every_batch_equals_the_walk_from_the_beginning(index, seed, purpose, window, budget):
    sampler = StepSampler(index, budget, seed, purpose, window)
    expected = oracle_batches(index, seed, purpose, window, budget, steps=8)
    for step in (5, 0, 7, 3, 1, 2, 6, 4):  # any order: nothing depends on what was asked before
        ids, epochs = sampler.global_batch(step)
        assert list(zip(ids.tolist(), epochs.tolist(), strict=True)) == expected[step]


@settings(max_examples=100, deadline=None)
@given(indexes, st.integers(0, 99), st.integers(1, 5), st.integers(1, 200), st.integers(1, 9))
def test_parts_are_sorted_disjoint_and_complete(index, seed, window, budget, parts):
    sampler = StepSampler(index, budget, seed, 1, window)
    for step in range(4):
        whole = list(zip(*(a.tolist() for a in sampler.global_batch(step)), strict=True))
        pieces = [list(zip(*(a.tolist() for a in sampler.part(step, p, parts)), strict=True)) for p in range(parts)]
        joined = [x for piece in pieces for x in piece]
        assert joined == sorted(whole, key=lambda x: (index.lengths[x[0]], x[0], x[1]))
        total = sum(int(index.lengths[i]) for i, _ in whole)
        for piece in pieces:
            size = [int(index.lengths[i]) for i, _ in piece]
            # A middle inside the cut leaves at most half an example over each of the two edges.
            assert sum(size) <= total / parts + max(size, default=0)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (3, 2), (8, 1)])
def test_each_example_exactly_once_an_epoch_over_all_parts(world, accumulate):
    rng = np.random.default_rng(0)
    index = make_index([rng.integers(1, 60, size=n).tolist() for n in (30, 7, 1, 55, 20)])
    sampler = StepSampler(index, 100, 7, 1, 2)
    parts = world * accumulate
    steps = 3 * int(np.ceil(sampler.steps_per_epoch))
    seen = [x for k in range(steps) for p in range(parts) for x in zip(*sampler.part(k, p, parts), strict=True)]
    for epoch in range(2):
        assert sorted(int(i) for i, e in seen if e == epoch) == list(range(sampler.examples_per_epoch))


def test_epoch_boundary_inside_a_batch():
    sampler = StepSampler(make_index([[3] * 10]), 20, 0, 1)  # an epoch is 30 long: step 1 covers 20..40
    ids, epochs = sampler.global_batch(1)
    assert sorted(set(epochs.tolist())) == [0, 1]
    assert np.all(np.diff(epochs) >= 0)
    first = np.concatenate([sampler.global_batch(0)[0], ids[epochs == 0]])
    assert sorted(first.tolist()) == list(range(10))


def test_budget_of_several_epochs():
    ids, epochs = StepSampler(make_index([[2, 2, 2]]), 60, 0, 1).global_batch(1)
    assert len(ids) == 30
    assert [sorted(ids[epochs == e].tolist()) for e in range(10, 20)] == [[0, 1, 2]] * 10


def test_a_far_step_is_found_without_walking():
    index = make_index([[5] * 1000] * 50)
    sampler = StepSampler(index, 800, 3, 1, 4)
    touched = []
    compute, sampler._remember = sampler._remember, lambda key, f: touched.append(key) or compute(key, f)
    ids, epochs = sampler.global_batch(10**12)
    assert epochs[0] == 10**12 * 800 // (5 * 50_000)
    assert len(ids) == 160
    assert len({k for k in touched if len(k) == 2}) <= 2  # at most two windows, whatever the step


def test_epochs_seeds_and_purposes_order_differently():
    index = make_index([[1] * 50] * 4)

    def order(seed, purpose, epoch):
        return StepSampler(index, 200, seed, purpose).global_batch(epoch)[0].tolist()

    orders = [order(0, 1, 0), order(0, 1, 1), order(1, 1, 0), order(0, 2, 0)]
    assert len({tuple(o) for o in orders}) == 4
    assert len(set(np.asarray(order(0, 1, 0)[:50]) // 50)) > 1  # shards of a window are mixed


def test_a_window_mixes_only_its_own_shards():
    ids, _ = StepSampler(make_index([[1] * 10] * 6), 20, 0, 1, window=2).global_batch(0)
    assert len(set((ids // 10).tolist())) == 2


def test_pickled_sampler_gives_the_same_batches():
    sampler = StepSampler(make_index([[3, 1, 4, 1, 5], [9, 2, 6]]), 7, 0, 1)
    again = pickle.loads(pickle.dumps(sampler))
    for step in range(9):
        np.testing.assert_array_equal(sampler.global_batch(step), again.global_batch(step))


def test_order_is_pinned():
    """A change here breaks the resume of every running job."""
    assert keyed_permutation(8, seed=7, purpose=1, use=2, epoch=3, block=4).tolist() == PINNED_PERMUTATION
    words = keyed_words(np.array([0, 1]), np.array([0, 5]), seed=7, purpose=4)
    assert [int(w) for w in words] == PINNED_WORDS


def test_keyed_words_are_spread_evenly():
    ids = np.arange(40_000)
    words = keyed_words(ids, np.zeros_like(ids), seed=1, purpose=4) % np.uint64(10)
    counts = np.bincount(words.astype(int), minlength=10)
    assert np.all(np.abs(counts - 4000) < 5 * np.sqrt(4000 * 0.9))


def test_wrong_arguments_are_named():
    index = make_index([[1, 2]])
    with pytest.raises(ValueError, match="frames_per_step"):
        StepSampler(index, 0, 0, 1)
    with pytest.raises(ValueError, match=r"part must be in 0\.\.1, got 2"):
        StepSampler(index, 5, 0, 1).part(0, 2, 2)
    with pytest.raises(ValueError, match="step must be at least 0"):
        StepSampler(index, 5, 0, 1).global_batch(-1)
