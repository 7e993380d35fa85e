"""The contrastive loss against float64, a row at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKEND, INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import contrastive

from slam_kernels import span_contrastive


def problem(rows, width, num, *, dtype=torch.float32, seed=0, missing=0.2, close=0.5):
    """Contexts near their targets; distractors with repeats, never the row itself, -1 singly and in whole rows."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randn(rows, width, generator=g, dtype=torch.float64)
    contexts = targets * close + torch.randn(rows, width, generator=g, dtype=torch.float64)
    drawn = torch.randint(0, max(rows - 1, 1), (rows, num), generator=g)
    drawn += drawn >= torch.arange(rows)[:, None]
    drawn[drawn >= rows] = -1
    drawn[torch.rand(rows, num, generator=g) < missing] = -1
    drawn[torch.rand(rows, generator=g) < missing] = -1
    return contexts.to(dtype).requires_grad_(), targets.to(dtype).requires_grad_(), drawn


def compare(rows, width, num, backend, *, tolerance=1e-5, temperature=0.1, certain=False, **options):
    """``certain``: rows may be so near to p = 1 that 1 - p, their gradient, is mostly rounding of logits to 1 / t."""
    contexts, targets, drawn = problem(rows, width, num, **options)
    loss, correct = span_contrastive(contexts, targets, drawn, temperature=temperature, backend=backend)
    expected, right = contrastive(contexts, targets, drawn, temperature)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if contexts.dtype == torch.float64 else torch.float32)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance, abs=tolerance)
    assert correct.dtype == torch.bool
    assert torch.equal(correct, right)
    ours = torch.autograd.grad(loss * 0.7, (contexts, targets))
    theirs = torch.autograd.grad(expected * 0.7, (contexts, targets))
    for a, b, t in zip(ours, theirs, (contexts, targets), strict=True):
        assert a.dtype == t.dtype
        allowed = tolerance * max(float(b.abs().max()), 1e-3)
        if certain:
            rounding = torch.finfo(torch.float32).eps / temperature
            allowed += 0.7 * rounding / (temperature * rows * float(t.detach().norm(dim=1).min()))
        assert float((a.double() - b.double()).abs().max()) <= allowed


@pytest.mark.parametrize(("rows", "width", "num"), [(1, 8, 3), (40, 16, 10), (37, 24, 7), (300, 12, 5), (20, 130, 100)])
def test_equals_float64(rows, width, num, backend):
    compare(rows, width, num, backend)


def test_float64_stays_float64(backend):
    compare(30, 16, 10, backend, dtype=torch.float64, tolerance=1e-12)


@settings(max_examples=4 if INTERPRETED else 15, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(4, 40),
    num=st.integers(1, 20),
    temperature=st.sampled_from([0.05, 0.1, 1.0]),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(rows, width, num, temperature, missing, seed):
    backend = BACKEND
    options = {"temperature": temperature, "missing": missing, "seed": seed}
    compare(rows, width, num, backend, tolerance=3e-5, certain=True, **options)


def test_no_rows_stay_connected(backend):
    contexts, targets = (torch.zeros(0, 8, requires_grad=True) for _ in range(2))
    drawn = torch.zeros(0, 5, dtype=torch.int64)
    loss, correct = span_contrastive(contexts, targets, drawn, temperature=0.1, backend=backend)
    assert (float(loss), correct.shape) == (0.0, (0,))
    loss.backward()
    assert contexts.grad.shape == targets.grad.shape == (0, 8)


def test_zero_vectors_have_finite_gradients(backend):
    contexts, targets, drawn = problem(12, 8, 4)
    with torch.no_grad():
        contexts[3], targets[5] = 0, 0
    loss, _ = span_contrastive(contexts, targets, drawn, temperature=0.1, backend=backend)
    grads = torch.autograd.grad(loss, (contexts, targets))
    assert all(g.isfinite().all() for g in (loss, *grads))


def test_equal_distractor_is_not_a_hit(backend):
    targets = torch.eye(4)[[0, 0, 1, 2]].requires_grad_()
    drawn = torch.tensor([[1, 2], [2, 3], [3, -1], [-1, -1]])
    _, correct = span_contrastive(targets.detach(), targets, drawn, temperature=0.1, backend=backend)
    assert correct.tolist() == [False, True, True, False]


def test_equal_distractor_is_not_a_hit_for_rounding(backend):
    """Vectors of few codes, each known up to the last bit, as a straight-through quantizer gives them."""
    g = torch.Generator().manual_seed(0)
    rows = 40 if INTERPRETED else 300
    codes = torch.arange(rows) % 4
    exact = torch.randn(4, 100, generator=g)[codes]
    targets = exact * (1 + torch.finfo(torch.float32).eps * torch.randint(-1, 2, (rows, 1), generator=g))
    drawn = (torch.arange(rows)[:, None] + 4 * torch.arange(1, 6)) % rows
    assert torch.equal(codes[drawn], codes[:, None].expand(-1, 5))
    contexts = torch.randn(rows, 100, generator=g)
    _, correct = span_contrastive(contexts, targets, drawn, temperature=0.1, backend=backend)
    assert not correct.any()


def test_same_bits_twice(backend):
    contexts, targets, drawn = problem(60, 16, 10)

    def run():
        loss, _ = span_contrastive(contexts, targets, drawn, temperature=0.1, backend=backend)
        return [loss, *torch.autograd.grad(loss, (contexts, targets))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradcheck(backend):
    contexts, targets, drawn = problem(7, 5, 3, dtype=torch.float64)

    def run(c, t):
        return span_contrastive(c, t, drawn, temperature=0.5, backend=backend)[0]

    assert torch.autograd.gradcheck(run, (contexts, targets), fast_mode=backend == "triton")


def test_autocast_keeps_float32(backend):
    contexts, targets, drawn = problem(40, 16, 10)
    plain, _ = span_contrastive(contexts, targets, drawn, temperature=0.1, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = span_contrastive(contexts, targets, drawn, temperature=0.1, backend=backend)
    assert torch.equal(plain, cast)


def test_errors_name_what_is_wrong():
    contexts, targets, drawn = problem(4, 8, 3)
    with pytest.raises(ValueError, match="targets must have shape \\(4, 8\\)"):
        span_contrastive(contexts, targets[:3], drawn, temperature=0.1)
    with pytest.raises(ValueError, match="distractors must be int64 \\(4, K\\)"):
        span_contrastive(contexts, targets, drawn.int(), temperature=0.1)
    with pytest.raises(ValueError, match="K = 0"):
        span_contrastive(contexts, targets, drawn[:, :0], temperature=0.1)
    with pytest.raises(ValueError, match="temperature=0"):
        span_contrastive(contexts, targets, drawn, temperature=0.0)
