"""Kernels of the span sampler."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.philox import BUDGET_COUNTER, threshold24
from .common import locate_rows, search_steps
from .random import top24, words4

BUDGET = tl.constexpr(BUDGET_COUNTER)


@triton.jit(do_not_specialize=["N", "S", "key", "threshold"])
def spans_by_start(
    CU, IDS, EPOCHS, MASK, N, S, key, threshold, SPAN: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """A row is masked if one of the SPAN rows up to it starts a span; words are drawn anew rather than exchanged."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = rows < N
    sequence = locate_rows(tl.where(real, rows, 0), CU, S, STEPS)
    begin, end = tl.load(CU + sequence), tl.load(CU + sequence + 1)
    example, epoch = tl.load(IDS + sequence), tl.load(EPOCHS + sequence)
    position = rows - begin
    last = end - begin - SPAN
    covered = rows < 0
    for back in range(SPAN):
        start = position - back
        word, _, _, _ = words4(key, start, example, epoch)
        covered = covered | ((top24(word) < threshold) & (start >= 0) & (start <= last))
    tl.store(MASK + rows, (covered & (example != -1)).to(tl.int8), mask=real)


@triton.jit(do_not_specialize=["key", "threshold"])
def spans_by_budget(CU, IDS, EPOCHS, MASK, key, threshold, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program a sequence: finds the word that the chosen slots do not exceed by bisection, then lays out the spans.

    MASK must be zero before. Bisection draws the words 32 times and keeps nothing: no sort, no scratch memory.
    """
    sequence = tl.program_id(0)
    begin = tl.load(CU + sequence)
    length = tl.load(CU + sequence + 1) - begin
    example, epoch = tl.load(IDS + sequence), tl.load(EPOCHS + sequence)
    reach = tl.minimum(length, SPAN)
    lane = tl.arange(0, BLOCK)

    divisor = tl.maximum(reach, 1).to(tl.int64)
    whole = length.to(tl.int64) * threshold
    spans = whole // (divisor << 24)
    rest = whole - spans * (divisor << 24)
    word, _, _, _ = words4(key, lane.to(tl.int64) * 0 + BUDGET, example, epoch)
    up = tl.max((top24(word).to(tl.int64) * divisor < rest).to(tl.int32), axis=0)
    spans = tl.minimum(spans + up, length // divisor)
    spans = tl.where(example == -1, 0, spans).to(tl.int32)
    slots = length - spans * (reach - 1)

    # The smallest word such that at least `spans` slots do not exceed it.
    low = length.to(tl.int64) * 0
    high = low + 0xFFFFFFFF
    while (low < high) & (spans > 0):
        middle = (low + high) // 2
        count = spans * 0
        base = 0
        while base < slots:
            slot = base + lane
            word, _, _, _ = words4(key, slot, example, epoch)
            count += tl.sum(((word.to(tl.int64) <= middle) & (slot < slots)).to(tl.int32), axis=0)
            base += BLOCK
        high = tl.where(count >= spans, middle, high)
        low = tl.where(count >= spans, low, middle + 1)

    # Slots below that word are in; slots that equal it, in order, until the budget is spent.
    below = spans * 0
    base = 0
    while (base < slots) & (spans > 0):
        slot = base + lane
        word, _, _, _ = words4(key, slot, example, epoch)
        below += tl.sum(((word.to(tl.int64) < low) & (slot < slots)).to(tl.int32), axis=0)
        base += BLOCK
    equal = spans * 0
    chosen = spans * 0
    base = 0
    while (base < slots) & (spans > 0):
        slot = base + lane
        word, _, _, _ = words4(key, slot, example, epoch)
        wide = word.to(tl.int64)
        same = ((wide == low) & (slot < slots)).to(tl.int32)
        rank = equal + tl.cumsum(same, axis=0) - same
        take = (((wide < low) & (slot < slots)) | ((same == 1) & (rank < spans - below))).to(tl.int32)
        earlier = chosen + tl.cumsum(take, axis=0) - take
        start = begin + slot + earlier * (reach - 1)
        for k in range(SPAN):
            tl.store(MASK + start + k, (take * 0 + 1).to(tl.int8), mask=(take == 1) & (k < reach))
        equal += tl.sum(same, axis=0)
        chosen += tl.sum(take, axis=0)
        base += BLOCK


@torch.library.custom_op("slam_kernels::sample_spans", mutates_args=())
def sample_spans_op(
    cu_seqlens: Tensor,
    example_ids: Tensor,
    epochs: Tensor,
    key: int,
    span: int,
    threshold: int,
    budget: bool,
    rows: int,
) -> Tensor:
    """Mask (N,) bool; ``threshold`` is the start probability or the rate times 2**24."""
    sequences = example_ids.numel()
    if budget:
        mask = torch.zeros(rows, dtype=torch.int8, device=cu_seqlens.device)
        with torch.cuda.device_of(cu_seqlens):  # Triton launches on the current device
            spans_by_budget[(sequences,)](
                cu_seqlens, example_ids, epochs, mask, key, threshold, SPAN=span, BLOCK=256, num_warps=4
            )
    else:
        mask = torch.empty(rows, dtype=torch.int8, device=cu_seqlens.device)
        if rows:
            with torch.cuda.device_of(cu_seqlens):
                spans_by_start[(triton.cdiv(rows, 128),)](
                    cu_seqlens, example_ids, epochs, mask, rows, sequences, key, threshold,
                    SPAN=span, STEPS=search_steps(sequences), BLOCK=128, num_warps=4,
                )  # fmt: skip
    return mask.to(torch.bool)


@sample_spans_op.register_fake
def _(cu_seqlens, example_ids, epochs, key, span, threshold, budget, rows):
    return torch.empty(rows, dtype=torch.bool, device=cu_seqlens.device)


def sample_spans(
    cu_seqlens: Tensor,
    example_ids: Tensor,
    epochs: Tensor,
    *,
    key: int,
    span: int,
    start_probability: float | None,
    rate: float | None,
    num_rows: int,
) -> Tensor:
    """See `slam_kernels.sample_spans`."""
    budget = start_probability is None
    threshold = threshold24(rate if start_probability is None else start_probability)
    contiguous = [t.contiguous() for t in (cu_seqlens, example_ids, epochs)]
    return sample_spans_op(*contiguous, key, span, threshold, budget, num_rows)
