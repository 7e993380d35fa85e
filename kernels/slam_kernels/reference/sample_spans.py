"""PyTorch twin of the span sampler: start probability with overlap, or a fixed budget of fixed-length spans."""

from __future__ import annotations

import torch

from .packed import row_positions, row_sequences
from .philox import BUDGET_COUNTER, MASK32, example_counters, philox, threshold24


def sample_spans(
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    span: int,
    start_probability: float | None,
    rate: float | None,
    num_rows: int,
) -> torch.Tensor:
    """See `slam_kernels.sample_spans`."""
    sequences = row_sequences(cu_seqlens, num_rows)
    positions = row_positions(cu_seqlens, sequences)
    counters = example_counters(example_ids, epochs)
    words = philox(key, positions, *(c.index_select(0, sequences) for c in counters))[0]
    lengths = cu_seqlens.diff().to(torch.int64)
    wanted = example_ids != -1
    if start_probability is not None:
        fits = positions <= lengths.index_select(0, sequences) - span
        start = (words >> 8 < threshold24(start_probability)) & fits & wanted.index_select(0, sequences)
        return _covered(start, span)
    assert rate is not None
    reach = lengths.clamp(max=span)
    spans = _budget(lengths, reach, counters, key, rate) * wanted
    return _place(cu_seqlens, sequences, positions, words, lengths, reach, spans)


def _covered(start: torch.Tensor, span: int) -> torch.Tensor:
    """Rows within ``span`` after a start. Whole spans fit their sequence, so none reaches into the next."""
    begun = start.to(torch.int64).cumsum(0)
    before = torch.nn.functional.pad(begun, (span, 0))[: begun.numel()]
    return begun > before


def _budget(
    lengths: torch.Tensor, reach: torch.Tensor, counters: tuple[torch.Tensor, ...], key: int, rate: float
) -> torch.Tensor:
    """Spans for every sequence: rate * length / reach rounded up or down by chance, in integers. *Shape:* ``(S,)``."""
    divisor = reach.clamp(min=1)
    whole = threshold24(rate) * lengths
    quotient = whole // (divisor << 24)
    remainder = whole - quotient * (divisor << 24)
    word = philox(key, torch.full_like(lengths, BUDGET_COUNTER), *counters)[0]
    up = (word >> 8) * divisor < remainder
    return torch.minimum(quotient + up, lengths // divisor)


def _place(
    cu_seqlens: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    words: torch.Tensor,
    lengths: torch.Tensor,
    reach: torch.Tensor,
    spans: torch.Tensor,
) -> torch.Tensor:
    """Each sequence's spans at the slots with the smallest words.

    Shrinking every span to one slot leaves length - spans * (reach - 1) slots; a choice of slots without replacement is
    a choice of non-overlapping spans, each equally likely. The i-th chosen slot begins at slot + i * (reach - 1).
    """
    rows = sequences.numel()
    begin = cu_seqlens.to(torch.int64).index_select(0, sequences)
    slots = (lengths - spans * (reach - 1)).index_select(0, sequences)
    # One stable sort for all sequences: the sequence in the high bits, then the word; rows that are no slot come last.
    order = torch.sort((sequences << 33) | torch.where(positions < slots, words, MASK32 + 1), stable=True).indices
    chosen = torch.zeros(rows, dtype=torch.int64, device=order.device)
    chosen[order] = (positions < spans.index_select(0, sequences)).to(torch.int64)
    through = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))
    earlier = through[:-1] - through.index_select(0, begin)
    width = reach.index_select(0, sequences)
    start = begin + positions + earlier * (width - 1)
    start = torch.where(chosen == 1, start, rows)
    first = torch.zeros(rows + 1, dtype=torch.int64, device=order.device).scatter_(0, start, 1)[:rows]
    # A row is masked if the last start at or before it lies in its own sequence and within the span.
    here = begin + positions
    last = torch.where(first == 1, here, -1).cummax(0).values if rows else here
    return (last >= begin) & (here - last < width)
