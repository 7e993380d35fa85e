"""What is drawn for masked rows: random vectors, corrupted tokens, distractors and Gumbel noise."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKEND, INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import KEY, examples, layout
from kernel_oracles import gaussian_at, gumbel_at, word_at, words_of

from slam_kernels import apply_spans, corrupt_tokens, gumbel_noise, sample_distractors

LENGTHS = [5, 0, 9, 1, 13, 4]


def packed(lengths=LENGTHS, share=0.5, seed=0):
    """cu_seqlens, ids, epochs, mask, and for every masked row its (row within the sequence, example, epoch)."""
    g = torch.Generator().manual_seed(seed)
    ids, epochs = examples(len(lengths))
    mask = torch.rand(sum(lengths), generator=g) < share
    places, row = [], 0
    for length, example, epoch in zip(lengths, ids.tolist(), epochs.tolist(), strict=True):
        places += [(t, example, epoch) for t in range(length) if mask[row + t]]
        row += length
    return layout(lengths), ids, epochs, mask, places


@pytest.mark.parametrize("columns", [1, 4, 7, 34])
def test_random_rows_are_the_keyed_gaussian(columns, backend):
    cu, ids, epochs, mask, places = packed()
    x = torch.randn(sum(LENGTHS), columns)
    y, index = apply_spans(x, mask, cu, ids, epochs, key=KEY, vector=None, std=0.1, backend=backend)
    assert torch.equal(index, mask.nonzero().squeeze(1))
    assert torch.equal(y[~mask], x[~mask])
    expected = torch.tensor(
        [[0.1 * gaussian_at(KEY, t, d, columns, e, p) for d in range(columns)] for t, e, p in places]
    )
    assert float((y[mask].double() - expected).abs().max()) < 2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learned", [False, True])
def test_apply_spans_gradients(learned, dtype, backend):
    cu, ids, epochs, mask, _ = packed()
    x = torch.randn(sum(LENGTHS), 6, dtype=dtype, requires_grad=True)
    vector = torch.randn(6, dtype=dtype, requires_grad=True) if learned else None
    y, index = apply_spans(x, mask, cu, ids, epochs, key=KEY, vector=vector, std=0.1, backend=backend)
    assert y.dtype == dtype
    assert not index.requires_grad
    if learned:
        assert torch.equal(y[mask], vector.detach().expand(int(mask.sum()), 6))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(x.grad, grad * ~mask[:, None])
    if learned:
        torch.testing.assert_close(vector.grad, grad[mask].sum(0))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("learned", [False, True])
def test_none_and_all_masked(share, learned, backend):
    cu, ids, epochs, mask, _ = packed(share=share)
    x = torch.randn(sum(LENGTHS), 6, requires_grad=True)
    vector = torch.randn(6, requires_grad=True) if learned else None
    y, index = apply_spans(x, mask, cu, ids, epochs, key=KEY, vector=vector, std=0.1, backend=backend)
    assert index.tolist() == (list(range(sum(LENGTHS))) if share else [])
    y.sum().backward()
    assert float(x.grad.sum()) == (0.0 if share else x.numel())
    if learned:
        assert vector.grad is not None


def test_corruption_equals_oracle(backend):
    cu, ids, epochs, mask, places = packed(LENGTHS * 3, share=0.7)
    tokens = torch.randint(0, 90, mask.shape)
    out, index = corrupt_tokens(tokens, mask, cu, ids, epochs, key=KEY, mask_id=99, vocab_size=77, backend=backend)
    assert torch.equal(index, mask.nonzero().squeeze(1))
    expected = tokens.clone()
    for row, (t, example, epoch) in zip(index.tolist(), places, strict=True):
        fate, draw, _, _ = words_of(KEY, t, example, epoch)
        if fate >> 8 < round(0.8 * 2**24):
            expected[row] = 99
        elif fate >> 8 < round(0.9 * 2**24):
            expected[row] = draw * 77 >> 32
    assert torch.equal(out, expected)
    assert {99} < set(out[mask].tolist())


def test_corruption_rates():
    rows = 40_000
    tokens = torch.full((rows,), 500)
    mask = torch.ones(rows, dtype=torch.bool)
    one = torch.zeros(1, dtype=torch.int64)
    out, _ = corrupt_tokens(tokens, mask, layout([rows]), one, one, key=KEY, mask_id=999, vocab_size=100)
    for share, hit in ((0.8, out == 999), (0.1, out < 100), (0.1, out == 500)):
        assert abs(float(hit.double().mean()) - share) < 4.5 * (share * (1 - share) / rows) ** 0.5
    drawn = out[out < 100].bincount(minlength=100).double()
    expected = float(drawn.sum()) / 100
    assert float(((drawn - expected) ** 2 / expected).sum()) < 160  # chi squared with 99 degrees, p < 1e-4


@pytest.mark.parametrize("num", [1, 4, 10])
def test_distractors_equal_oracle(num, backend):
    cu, ids, epochs, mask, places = packed(share=0.6)
    index = mask.nonzero().squeeze(1)
    drawn = sample_distractors(index, cu, ids, epochs, key=KEY, num=num, backend=backend)
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[index].tolist()
    for m, (t, example, epoch) in enumerate(places):
        others = [j for j in range(len(places)) if sequence[j] == sequence[m] and j != m]
        words = [word_at(KEY, t, k, num, example, epoch) for k in range(num)]
        assert drawn[m].tolist() == ([others[w * len(others) >> 32] for w in words] if others else [-1] * num)


def test_distractors_are_uniform_over_the_others():
    length, num = 9, 4000
    one = torch.zeros(1, dtype=torch.int64)
    drawn = sample_distractors(torch.arange(length), layout([length]), one, one, key=KEY, num=num)
    for m in range(length):
        counts = drawn[m].bincount(minlength=length).double()
        assert counts[m] == 0
        expected = num / (length - 1)
        assert float(counts.sum() and ((counts - expected) ** 2 / expected)[torch.arange(length) != m].sum()) < 30


@pytest.mark.parametrize("num", [1, 5, 64])
def test_gumbel_equals_oracle(num, backend):
    cu, ids, epochs, mask, places = packed()
    index = mask.nonzero().squeeze(1)
    noise = gumbel_noise(index, cu, ids, epochs, key=KEY, num=num, dtype=torch.float32, backend=backend)
    expected = torch.tensor([[gumbel_at(KEY, t, k, num, e, p) for k in range(num)] for t, e, p in places])
    torch.testing.assert_close(noise.double(), expected.double(), rtol=2e-6, atol=1e-6)
    wide = gumbel_noise(index, cu, ids, epochs, key=KEY, num=num, dtype=torch.float64, backend=backend)
    assert torch.equal(wide, noise.double())


def test_empty_index(backend):
    cu, ids, epochs, *_ = packed()
    index = torch.zeros(0, dtype=torch.int64)
    assert sample_distractors(index, cu, ids, epochs, key=KEY, num=3, backend=backend).shape == (0, 3)
    noise = gumbel_noise(index, cu, ids, epochs, key=KEY, num=5, dtype=torch.float32, backend=backend)
    assert noise.shape == (0, 5)


@settings(max_examples=4 if INTERPRETED else 15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    share=st.floats(0, 1),
    num=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_noise_does_not_depend_on_the_batch(lengths, share, num, seed):
    backend = BACKEND
    cu, ids, epochs, mask, _ = packed(lengths, share, seed)
    index = mask.nonzero().squeeze(1)
    x = torch.randn(sum(lengths), num)
    tokens = torch.randint(0, 50, (sum(lengths),))
    distractors = sample_distractors(index, cu, ids, epochs, key=KEY, num=num, backend=backend)
    noise = gumbel_noise(index, cu, ids, epochs, key=KEY, num=num, dtype=torch.float32, backend=backend)
    masked, _ = apply_spans(x, mask, cu, ids, epochs, key=KEY, vector=None, std=1.0, backend=backend)
    corrupted, _ = corrupt_tokens(tokens, mask, cu, ids, epochs, key=KEY, mask_id=51, vocab_size=50, backend=backend)
    # One sequence alone, which has its own place in the batch when it comes last.
    s = seed % len(lengths)
    begin, end = int(cu[s]), int(cu[s + 1])
    here = (index >= begin) & (index < end)
    one = (layout([lengths[s]]), ids[s : s + 1], epochs[s : s + 1])
    alone = index[here] - begin
    theirs = sample_distractors(alone, *one, key=KEY, num=num, backend=backend)
    before = int((index < begin).sum())
    assert torch.equal(torch.where(distractors[here] < 0, -1, distractors[here] - before), theirs)
    assert torch.equal(noise[here], gumbel_noise(alone, *one, key=KEY, num=num, dtype=torch.float32, backend=backend))
    rows = apply_spans(x[begin:end], mask[begin:end], *one, key=KEY, vector=None, std=1.0, backend=backend)[0]
    assert torch.equal(masked[begin:end], rows)
    options = {"key": KEY, "mask_id": 51, "vocab_size": 50, "backend": backend}
    assert torch.equal(corrupted[begin:end], corrupt_tokens(tokens[begin:end], mask[begin:end], *one, **options)[0])


def test_errors_name_what_is_wrong():
    cu, ids, epochs, mask, _ = packed()
    x = torch.randn(sum(LENGTHS), 6)
    tokens = torch.zeros(sum(LENGTHS), dtype=torch.int64)
    with pytest.raises(ValueError, match="mask must be bool"):
        apply_spans(x, mask.int(), cu, ids, epochs, key=1, vector=None, std=0.1)
    with pytest.raises(ValueError, match="vector must have shape \\(6,\\)"):
        apply_spans(x, mask, cu, ids, epochs, key=1, vector=torch.zeros(5), std=0.1)
    with pytest.raises(ValueError, match="must lie in"):
        corrupt_tokens(tokens, mask, cu, ids, epochs, key=1, mask_id=1, vocab_size=9, random_probability=0.3)
    with pytest.raises(ValueError, match="vocab_size=0"):
        corrupt_tokens(tokens, mask, cu, ids, epochs, key=1, mask_id=1, vocab_size=0)
    with pytest.raises(ValueError, match="num=0"):
        sample_distractors(tokens, cu, ids, epochs, key=1, num=0)
    with pytest.raises(ValueError, match="index must be int64"):
        gumbel_noise(tokens.int(), cu, ids, epochs, key=1, num=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="floating-point type"):
        gumbel_noise(tokens, cu, ids, epochs, key=1, num=4, dtype=torch.int64)
