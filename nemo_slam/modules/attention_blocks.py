"""Sequences of a packed batch as padded blocks for attention kernels that want ``(B, T)``, and back.

Two plans. :attr:`SequenceLayout.blocks` is tight, and its shapes differ from batch to batch: for kernels that take any
shape at no cost. :func:`bounded_blocks` knows few shapes: cuDNN, behind Transformer Engine, builds and keeps a plan for
each one, which takes longer than running it.

Shapes: N packed rows, B sequences of a block, T their longest length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_slam.packing import SequenceLayout, ranges, to_device

NARROWEST = 64
"""The narrowest block; every width is a multiple of 16, as FP8 wants it."""


@dataclass(frozen=True)
class BoundedBlock:
    """Sequences of one class of lengths.

    *Shape:* ``index`` (B * T,) int64 rows, padding points at row 0; ``cu_seqlens`` (B + 1,) int32, the sums of the
    real lengths; ``size`` is B, ``width`` T. B counts fillers too, sequences of one row that nobody reads.
    """

    index: Tensor
    cu_seqlens: Tensor
    size: int
    width: int


@dataclass(frozen=True)
class BlockPlan:
    """Attributes:
    blocks: widest first.
    inverse: (N,) int64: each row's place in the blocks laid end to end; tail rows point one past the last.
    """

    blocks: tuple[BoundedBlock, ...]
    inverse: Tensor


def _next_step(value: int, smallest: int, halves_from: int) -> int:
    """The next of ``smallest * 2**k``, and from ``halves_from`` on also of the points halfway between."""
    step = smallest
    while step < value:
        if step >= halves_from and step * 3 // 2 >= value:
            return step * 3 // 2
        step *= 2
    return step


def block_width(length: int) -> int:
    """Columns for a sequence of ``length`` rows: 64, 128, 256, 384, 512, 768, 1024, 1536 ...

    >>> [block_width(n) for n in (1, 64, 65, 300, 385, 1025)]
    [64, 64, 128, 384, 512, 1536]
    """
    return _next_step(length, NARROWEST, 256)


def block_size(count: int) -> int:
    """Sequences of a block with ``count`` real ones: 1, 2, 3, 4, 6, 8, 12, 16, 24 ...

    >>> [block_size(n) for n in (1, 3, 5, 9, 13)]
    [1, 3, 6, 12, 16]
    """
    return _next_step(count, 1, 2)


def bounded_blocks(layout: SequenceLayout) -> BlockPlan:
    """The sequences of a layout but its tail, grouped by :func:`block_width`; made once a layout."""
    cache = vars(layout)
    if "_bounded_blocks" not in cache:
        cache["_bounded_blocks"] = _plan(layout)
    return cache["_bounded_blocks"]


def _plan(layout: SequenceLayout) -> BlockPlan:
    lengths, device = layout.lengths[:-1], layout.cu_seqlens.device
    starts = np.cumsum(lengths) - lengths
    widths = np.array([block_width(int(length)) if length else 0 for length in lengths], np.int64)
    inverse = np.empty(layout.num_rows, np.int64)
    blocks: list[BoundedBlock] = []
    base = 0
    for width in sorted(set(widths.tolist()) - {0}, reverse=True):
        chosen = np.flatnonzero(widths == width)
        size = block_size(len(chosen))
        real = np.arange(width) < lengths[chosen, None]
        index = np.zeros((size, width), np.int64)
        rows = ranges(starts[chosen], lengths[chosen])
        index[: len(chosen)][real] = rows
        inverse[rows] = base + np.flatnonzero(real)
        filled = np.concatenate([lengths[chosen], np.ones(size - len(chosen), np.int64)])
        cu_seqlens = np.concatenate([[0], np.cumsum(filled)])
        blocks.append(
            BoundedBlock(
                index=to_device(index.reshape(-1), device),
                cu_seqlens=to_device(cu_seqlens, device, torch.int32),
                size=size,
                width=width,
            )
        )
        base += size * width
    inverse[layout.num_valid :] = base
    return BlockPlan(tuple(blocks), to_device(inverse, device))


def _gather(blocks: Sequence[Tensor], inverse: Tensor, valid: int) -> Tensor:
    """Places (P, ...) in blocks -> rows (N, ...), zeros for those from ``valid`` on."""
    places = blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))
    rows = places.new_empty(len(inverse), *places.shape[1:])
    torch.index_select(places, 0, inverse[:valid], out=rows[:valid])
    rows[valid:] = 0
    return rows


class _ToBlocks(torch.autograd.Function):
    """Rows to blocks. Its gradient is a gather too: autograd's own for a gather is a slower, unordered sum, and would
    add what a kernel leaves in the padding to row 0."""

    @staticmethod
    def forward(ctx, rows: Tensor, inverse: Tensor, valid: int, *indices: Tensor):
        ctx.save_for_backward(inverse)
        ctx.valid = valid
        return tuple(rows.index_select(0, index) for index in indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        (inverse,) = ctx.saved_tensors
        return _gather(grads, inverse, ctx.valid), None, None, *[None] * len(grads)


class _FromBlocks(torch.autograd.Function):
    """Blocks to rows, zeros for the tail; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx, inverse: Tensor, valid: int, *blocks: Tensor):
        ctx.save_for_backward(inverse)
        ctx.valid, ctx.sizes = valid, [len(block) for block in blocks]
        return _gather(blocks, inverse, valid)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        places = grad.new_zeros(sum(ctx.sizes), *grad.shape[1:])
        places.index_copy_(0, inverse[: ctx.valid], grad[: ctx.valid])
        return None, None, *places.split(ctx.sizes)


def to_blocks(rows: Tensor, inverse: Tensor, valid: int, indices: list[Tensor]) -> tuple[Tensor, ...]:
    """Rows (N, ...), of which the first ``valid`` are no tail -> one (B * T, ...) for each index; there must be one."""
    return _ToBlocks.apply(rows, inverse, valid, *indices)


def from_blocks(blocks: list[Tensor], inverse: Tensor, valid: int) -> Tensor:
    """One (B * T, ...) for each block -> rows (N, ...), zeros from ``valid`` on; there must be one."""
    return _FromBlocks.apply(inverse, valid, *blocks)
