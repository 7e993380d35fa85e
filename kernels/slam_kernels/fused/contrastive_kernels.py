"""Kernels of the contrastive loss: vectors are gathered into registers, never into memory.

Legend: M rows, D width, K distractors. CONTEXTS, TARGETS (M, D), DRAWN (M, K), LOGITS (M, K) cosine / temperature, LSE
and OWN (M,) log-sum-exp and positive logit, CSCALE and TSCALE (M,) one over each vector's length (at least EPS).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference.span_contrastive import EPS as _EPS
from ..reference.span_contrastive import TIE as _TIE

EPS = tl.constexpr(_EPS)
TIE = tl.constexpr(_TIE)


@triton.jit
def inverse_lengths(ROWS, SCALE, D: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """SCALE (M,): one over max(length, EPS)."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    row = tl.load(ROWS + m * D + d, mask=d < D, other=0.0).to(ACC)
    tl.store(SCALE + m, 1.0 / tl.sqrt(tl.maximum(tl.sum(row * row, axis=0), EPS * EPS)))


@triton.jit
def contrastive_rows(
    CONTEXTS, TARGETS, DRAWN, CSCALE, TSCALE, LOGITS, LSE, OWN, LOSS, CORRECT, inverse_temperature,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, GATHER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row: GATHER distractors at a time, log-sum-exp as they come."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    here = d < D
    scale = tl.load(CSCALE + m) * inverse_temperature
    context = tl.load(CONTEXTS + m * D + d, mask=here, other=0.0).to(ACC) * scale
    target = tl.load(TARGETS + m * D + d, mask=here, other=0.0).to(ACC)
    own = tl.sum(context * target, axis=0) * tl.load(TSCALE + m)
    highest = own
    total = own * 0.0 + 1.0
    rival = own * 0.0 - float("inf")
    for base in range(0, K, GATHER):
        k = base + tl.arange(0, GATHER)
        drawn = tl.load(DRAWN + m * K + k, mask=k < K, other=-1)
        present = drawn >= 0
        place = tl.where(present, drawn, 0)
        rows = tl.load(TARGETS + place[:, None] * D + d[None, :], mask=present[:, None] & here[None, :], other=0.0).to(
            ACC
        )
        logit = tl.sum(rows * context[None, :], axis=1) * tl.load(TSCALE + place)
        logit = tl.where(present, logit, -float("inf"))
        tl.store(LOGITS + m * K + k, logit, mask=k < K)
        rival = tl.maximum(rival, tl.max(logit, axis=0))
        higher = tl.maximum(highest, rival)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logit - higher), axis=0)
        highest = higher
    lse = highest + tl.log(total)
    tl.store(LSE + m, lse)
    tl.store(OWN + m, own)
    some = rival > -float("inf")
    tl.store(LOSS + m, tl.where(some, lse - own, 0.0))
    tl.store(CORRECT + m, ((own > rival + TIE * inverse_temperature) & some).to(tl.int8))


@triton.jit
def context_gradient(
    GRAD, CONTEXTS, TARGETS, DRAWN, CSCALE, TSCALE, LOGITS, LSE, OWN, DCONTEXTS, inverse_temperature,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, GATHER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DCONTEXTS (M, D) of one row: the softmax-weighted sum of its targets, less its part along the context."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    here = d < D
    lse, own = tl.load(LSE + m), tl.load(OWN + m)
    grad = tl.load(GRAD).to(ACC)
    pull = (tl.exp(own - lse) - 1.0) * tl.load(TSCALE + m)
    total = tl.load(TARGETS + m * D + d, mask=here, other=0.0).to(ACC) * pull
    for base in range(0, K, GATHER):
        k = base + tl.arange(0, GATHER)
        drawn = tl.load(DRAWN + m * K + k, mask=k < K, other=-1)
        present = drawn >= 0
        place = tl.where(present, drawn, 0)
        logit = tl.load(LOGITS + m * K + k, mask=present, other=-float("inf"))
        push = tl.where(present, tl.exp(logit - lse), 0.0) * tl.load(TSCALE + place)
        rows = tl.load(TARGETS + place[:, None] * D + d[None, :], mask=present[:, None] & here[None, :], other=0.0).to(
            ACC
        )
        total += tl.sum(rows * push[:, None], axis=0)
    scale = tl.load(CSCALE + m)
    unit = tl.load(CONTEXTS + m * D + d, mask=here, other=0.0).to(ACC) * scale
    # A vector shorter than EPS is divided by a constant: nothing to take away.
    along = tl.where(scale * EPS < 1.0, tl.sum(total * unit, axis=0), 0.0)
    slope = (total - unit * along) * (scale * inverse_temperature * grad)
    tl.store(DCONTEXTS + m * D + d, slope.to(DCONTEXTS.dtype.element_ty), mask=here)


@triton.jit
def target_gradient(
    GRAD, CONTEXTS, TARGETS, ORDER, BOUNDS, CSCALE, TSCALE, LOGITS, LSE, OWN, DTARGETS, inverse_temperature,
    D: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, GATHER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DTARGETS (M, D) of one target: over its own row and over the places where it was drawn, in their order.

    ORDER (M K,) lists the flat places of DRAWN sorted by target, BOUNDS (M + 1,) where each target's begin.
    """
    m = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    here = d < D
    grad = tl.load(GRAD).to(ACC)
    pull = (tl.exp(tl.load(OWN + m) - tl.load(LSE + m)) - 1.0) * tl.load(CSCALE + m)
    total = tl.load(CONTEXTS + m * D + d, mask=here, other=0.0).to(ACC) * pull
    base, last = tl.load(BOUNDS + m), tl.load(BOUNDS + m + 1)
    while base < last:
        e = base + tl.arange(0, GATHER)
        present = e < last
        place = tl.load(ORDER + e, mask=present, other=0)
        row = place // K
        logit = tl.load(LOGITS + place, mask=present, other=-float("inf"))
        push = tl.exp(logit - tl.load(LSE + row)) * tl.load(CSCALE + row)
        push = tl.where(present, push, 0.0)
        rows = tl.load(CONTEXTS + row[:, None] * D + d[None, :], mask=present[:, None] & here[None, :], other=0.0).to(
            ACC
        )
        total += tl.sum(rows * push[:, None], axis=0)
        base += GATHER
    scale = tl.load(TSCALE + m)
    unit = tl.load(TARGETS + m * D + d, mask=here, other=0.0).to(ACC) * scale
    along = tl.where(scale * EPS < 1.0, tl.sum(total * unit, axis=0), 0.0)
    slope = (total - unit * along) * (scale * inverse_temperature * grad)
    tl.store(DTARGETS + m * D + d, slope.to(DTARGETS.dtype.element_ty), mask=here)
