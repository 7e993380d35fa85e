"""Rows and sequences of a packed batch: which sequence a row belongs to, sums over sequences, and back."""

from __future__ import annotations

import torch


def row_sequences(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The sequence of every row. *Shape:* ``(S + 1,)`` -> ``(N,)`` int64. Needs no device synchronisation."""
    lengths = cu_seqlens.diff()
    sequences = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, lengths, output_size=num_rows)


def row_positions(cu_seqlens: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """The place of every row within its sequence. *Shape:* ``(N,)`` -> ``(N,)`` int64."""
    rows = torch.arange(sequences.numel(), device=sequences.device)
    return rows - cu_seqlens.to(torch.int64).index_select(0, sequences)


class _SegmentSum(torch.autograd.Function):
    """Sums rows over each sequence, one after the other: no atomics, so the same bits every time."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, cu_seqlens: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens, sequences)
        lengths = cu_seqlens.diff().to(torch.int64)
        return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        cu_seqlens, sequences = ctx.saved_tensors
        return segment_expand(grad, cu_seqlens, sequences), None, None


class _SegmentExpand(torch.autograd.Function):
    """Gives every row its sequence's value; the transpose of the sum."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, cu_seqlens: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cu_seqlens, sequences)
        return values.index_select(0, sequences)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        cu_seqlens, sequences = ctx.saved_tensors
        return segment_sum(grad, cu_seqlens, sequences), None, None


def segment_sum(rows: torch.Tensor, cu_seqlens: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Sum over each sequence. *Shape:* ``(N, G)`` -> ``(S, G)``; an empty sequence gives 0."""
    return _SegmentSum.apply(rows, cu_seqlens, sequences)


def segment_expand(values: torch.Tensor, cu_seqlens: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Each row's value of its sequence. *Shape:* ``(S, G)`` -> ``(N, G)``."""
    return _SegmentExpand.apply(values, cu_seqlens, sequences)
