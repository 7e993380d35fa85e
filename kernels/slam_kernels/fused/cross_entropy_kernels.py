"""Kernels of the masked cross entropy over a chunk of logits. Legend: R rows of the chunk, V vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy_rows(
    LOGITS, BIAS, TARGETS, LOSS, LSE, CORRECT,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row: log-sum-exp, loss, and whether the target is the first of the highest."""
    r = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + r)
    highest = tl.full([], -float("inf"), ACC)
    total = tl.full([], 0.0, ACC)
    hit = tl.full([], 0.0, ACC)
    best = tl.full([], 0, tl.int64)
    for base in range(0, V, BLOCK):
        v = base + tl.arange(0, BLOCK)
        logit = tl.load(LOGITS + r * V + v, mask=v < V, other=-float("inf")).to(ACC)
        if HAS_BIAS:
            logit += tl.load(BIAS + v, mask=v < V, other=0.0).to(ACC)
        top = tl.max(logit, axis=0)
        # The lowest of the places that hold the block's maximum; an earlier block keeps a tie.
        place = tl.min(tl.where(logit == top, v, V), axis=0).to(tl.int64)
        best = tl.where(top > highest, place, best)
        higher = tl.maximum(highest, top)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logit - higher), axis=0)
        highest = higher
        hit += tl.sum(tl.where(v == target, logit, 0.0), axis=0)
    lse = highest + tl.log(total)
    tl.store(LSE + r, lse)
    tl.store(LOSS + r, lse - hit)
    tl.store(CORRECT + r, (best == target).to(tl.int8))


@triton.jit
def cross_entropy_gradient(
    GRAD, LOGITS, BIAS, TARGETS, LSE, SLOPES,
    V: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """SLOPES (R, V): the gradient of the logits."""
    r = tl.program_id(0).to(tl.int64)
    target, lse, grad = tl.load(TARGETS + r), tl.load(LSE + r), tl.load(GRAD).to(ACC)
    for base in range(0, V, BLOCK):
        v = base + tl.arange(0, BLOCK)
        logit = tl.load(LOGITS + r * V + v, mask=v < V, other=-float("inf")).to(ACC)
        if HAS_BIAS:
            logit += tl.load(BIAS + v, mask=v < V, other=0.0).to(ACC)
        slope = (tl.exp(logit - lse) - (v == target).to(ACC)) * grad
        tl.store(SLOPES + r * V + v, slope.to(SLOPES.dtype.element_ty), mask=v < V)
