"""The masked cross entropy against F.cross_entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKEND, INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st

from slam_kernels import masked_cross_entropy


def problem(rows, width, vocab, masked, *, dtype=torch.float32, bias=True, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    index = torch.randperm(rows, generator=g)[:masked].sort().values
    targets = torch.randint(0, vocab, (masked,), generator=g)
    return draw(rows, width), index, targets, draw(vocab, width), draw(vocab) if bias else None


def compare(*shape, backend, tolerance=1e-5, **options):
    hidden, index, targets, weight, bias = problem(*shape, **options)
    loss, correct = masked_cross_entropy(hidden, index, targets, weight, bias, backend=backend)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(wide[0][index], wide[1], wide[2])
    expected = F.cross_entropy(logits, targets, reduction="sum")
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance, abs=tolerance)
    assert torch.equal(correct, logits.argmax(1) == targets)
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    ours = torch.autograd.grad(loss * 1.3, inputs)
    theirs = torch.autograd.grad(expected * 1.3, [t for t in wide if t is not None])
    for a, b, t in zip(ours, theirs, inputs, strict=True):
        assert a.dtype == t.dtype
        assert float((a.double() - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 8, 5, 4), (60, 16, 33, 40), (30, 70, 130, 30), (5, 4, 1, 3)])
def test_equals_float64(shape, bias, backend):
    compare(*shape, backend=backend, bias=bias)


def test_float64_stays_float64(backend):
    compare(60, 16, 33, 40, backend=backend, dtype=torch.float64, tolerance=1e-12)


@settings(max_examples=4 if INTERPRETED else 15, deadline=None)
@given(
    rows=st.integers(1, 50),
    share=st.floats(0, 1),
    width=st.integers(1, 40),
    vocab=st.integers(1, 150),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(rows, share, width, vocab, scale, bias, seed):
    backend = BACKEND
    masked = round(share * rows)
    compare(rows, width, vocab, masked, backend=backend, scale=scale, bias=bias, seed=seed, tolerance=3e-5)


def test_no_rows_stay_connected(backend):
    hidden, index, targets, weight, bias = problem(9, 8, 5, 0)
    loss, correct = masked_cross_entropy(hidden, index, targets, weight, bias, backend=backend)
    assert (float(loss), correct.shape) == (0.0, (0,))
    loss.backward()
    assert all(float(t.grad.abs().sum()) == 0 for t in (hidden, weight, bias))


def test_first_of_equal_logits_is_the_answer(backend):
    hidden, weight = torch.ones(3, 2), torch.ones(4, 2)
    _, correct = masked_cross_entropy(
        hidden, torch.arange(3), torch.tensor([0, 1, 3]), weight, torch.tensor([0.0, 0, 0, -1]), backend=backend
    )
    assert correct.tolist() == [True, False, False]


def test_large_logits_do_not_overflow(backend):
    compare(20, 16, 33, 12, backend=backend, scale=30.0)


def test_same_bits_twice(backend):
    hidden, index, targets, weight, bias = problem(60, 16, 33, 40)

    def run():
        loss, _ = masked_cross_entropy(hidden, index, targets, weight, bias, backend=backend)
        return [loss, *torch.autograd.grad(loss, (hidden, weight, bias))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradcheck(backend):
    hidden, index, targets, weight, bias = problem(6, 4, 5, 3, dtype=torch.float64)

    def run(h, w, b):
        return masked_cross_entropy(h, index, targets, w, b, backend=backend)[0]

    assert torch.autograd.gradcheck(run, (hidden, weight, bias), fast_mode=backend == "triton")


def test_errors_name_what_is_wrong():
    hidden, index, targets, weight, bias = problem(9, 8, 5, 4)
    with pytest.raises(ValueError, match="weight must be \\(V, 8\\)"):
        masked_cross_entropy(hidden, index, targets, weight[:, :7], bias)
    with pytest.raises(ValueError, match="targets must have shape \\(4,\\)"):
        masked_cross_entropy(hidden, index, targets[:3], weight, bias)
    with pytest.raises(ValueError, match="bias must have shape \\(5,\\)"):
        masked_cross_entropy(hidden, index, targets, weight, bias[:4])
    with pytest.raises(ValueError, match="index must be int64"):
        masked_cross_entropy(hidden, index.int(), targets, weight, bias)
