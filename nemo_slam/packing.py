"""Packed batches: every sequence of a step lies end to end on one axis, without padding.

The encoders of nemo_slam work on rows ``(N, D)``. A :class:`SequenceLayout` says which rows belong to which sequence,
and :func:`pack` builds one from *segments*: a multimodal sequence is, for instance, the CLS row, then the rows of one
utterance, then the rows of one text, each a range of rows in some source tensor. Packing is then a single gather.

Everything here is planned on the CPU from lengths alone, so that packing needs no device synchronisation.

Shape legend: N packed rows, S sequences, D width, H heads, B sequences of a block, T their longest length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

MAX_BLOCK_PADDING = 0.125
"""Padding that an attention block may hold, as a share of its positions, before a new block is opened."""


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate ``arange(start, start + length)`` over all pairs.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts - offsets, lengths) + np.arange(int(lengths.sum()))


def to_device(values: np.ndarray, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """What was planned on the CPU, on ``device``, without waiting for it.

    A plain copy to a GPU waits until the GPU has done all that it was given before. From page-locked memory, which
    PyTorch keeps until the copy is done, it only joins the queue.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Block:
    """Sequences of similar length as one padded block, for attention kernels that want ``(B, T)``.

    *Shape:* ``index`` (B * T,) int64 rows, padding points at row 0; ``mask`` (B, 1, 1, T) bool, True on real keys, or
    None where nothing is padded; ``lengths`` (B,) int32.
    """

    index: Tensor
    mask: Tensor | None
    lengths: Tensor
    size: int
    width: int


@dataclass(frozen=True)
class SequenceLayout:
    """Which of the N packed rows belong to which sequence.

    The last sequence is the *tail*: rows that round N up to a multiple. No block contains it and no loss reads it;
    kernels treat it as one more sequence.

    *Shape:* ``lengths`` (S,) on the CPU, tail included; ``cu_seqlens`` (S + 1,) int32 on the device, ending at N;
    ``positions`` (N,) int64, the row's place in its own segment (see :func:`pack`).
    """

    lengths: np.ndarray
    cu_seqlens: Tensor
    positions: Tensor

    @property
    def num_rows(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_valid(self) -> int:
        """Rows that carry data: all but the tail."""
        return self.num_rows - int(self.lengths[-1])

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The sequences without the tail, grouped by similar length whatever their kind."""
        return self._attention_plan[0]

    @property
    def inverse(self) -> Tensor:
        """(N,) int64: each row's place in the blocks' positions laid end to end; tail rows point one past the last."""
        return self._attention_plan[1]

    @cached_property
    def _attention_plan(self) -> tuple[tuple[Block, ...], Tensor]:
        lengths = self.lengths[:-1]
        device = self.cu_seqlens.device
        blocks, inverse = _blocks(np.cumsum(lengths) - lengths, lengths, self.num_rows, device)
        return blocks, to_device(inverse, device)

    @property
    def block_positions(self) -> int:
        """Positions of :attr:`blocks`, padding included, without making them."""
        lengths = -np.sort(-self.lengths[:-1])
        lengths = lengths[lengths > 0]
        return sum((last - first) * int(lengths[first]) for first, last in _cuts(lengths))

    @classmethod
    def build(
        cls,
        lengths: np.ndarray,
        device: torch.device | str = "cpu",
        multiple: int = 1,
        positions: np.ndarray | None = None,
    ) -> SequenceLayout:
        """Lay sequences of the given lengths (S,) end to end, with a tail that rounds N up to ``multiple`` (and to at
        least 1)."""
        lengths = np.asarray(lengths, np.int64)
        if lengths.ndim != 1 or (lengths < 0).any():
            raise ValueError(f"lengths must be a vector of non-negative integers, got {lengths!r}")
        valid = int(lengths.sum())
        tail = max(-(-valid // multiple) * multiple, multiple) - valid
        if positions is None:
            positions = ranges(np.zeros(len(lengths), np.int64), lengths)
        positions = np.concatenate([positions, np.arange(tail)])
        full = np.append(lengths, tail)
        cu_seqlens = np.concatenate([[0], np.cumsum(full)])
        if cu_seqlens[-1] > np.iinfo(np.int32).max:
            raise ValueError(
                f"a packed batch of {cu_seqlens[-1]} rows does not fit int32 offsets: lower the batch budget"
            )
        return cls(
            lengths=full,
            cu_seqlens=to_device(cu_seqlens, device, torch.int32),
            positions=to_device(positions, device),
        )


def _cuts(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where to cut lengths, longest first, into blocks that hold at most MAX_BLOCK_PADDING of padding."""
    first = 0
    while first < len(lengths):
        used = np.cumsum(lengths[first:])
        full = int(lengths[first]) * np.arange(1, len(used) + 1)
        too_loose = np.flatnonzero(full - used > MAX_BLOCK_PADDING * full)
        last = first + (int(too_loose[0]) if len(too_loose) else len(used))
        yield first, last
        first = last


def _blocks(
    starts: np.ndarray, lengths: np.ndarray, num_rows: int, device: torch.device | str
) -> tuple[tuple[Block, ...], np.ndarray]:
    """The sequences as blocks, cut by :func:`_cuts`."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    sorted_lengths = lengths[order]
    blocks: list[Block] = []
    inverse = np.empty(num_rows, np.int64)
    base = 0
    for first, last in _cuts(sorted_lengths):
        width = int(sorted_lengths[first])
        chosen = order[first:last]
        size, sizes = len(chosen), lengths[chosen]
        real = np.arange(width) < sizes[:, None]
        index = np.zeros((size, width), np.int64)
        rows = ranges(starts[chosen], sizes)
        index[real] = rows
        inverse[rows] = base + np.flatnonzero(real)
        mask = None if real.all() else to_device(real[:, None, None, :], device)
        blocks.append(
            Block(
                index=to_device(index.reshape(-1), device),
                mask=mask,
                lengths=to_device(sizes, device, torch.int32),
                size=size,
                width=width,
            )
        )
        base += size * width
    inverse[int(lengths.sum()) :] = base
    return tuple(blocks), inverse


@dataclass(frozen=True)
class Segments:
    """One kind of sequence: S sequences of the same k segments, each a range of rows in the source.

    *Shape:* ``starts`` and ``lengths`` (S, k) int64.
    """

    starts: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        if self.starts.shape != self.lengths.shape or self.starts.ndim != 2:
            raise ValueError(f"starts {self.starts.shape} and lengths {self.lengths.shape} must both be (S, k)")


@dataclass(frozen=True)
class PackedSequences:
    """The plan of one packed batch: kinds of sequences, each kind contiguous and sorted by length, then the tail.

    *Shape:* ``gather`` (N,) int64 into the source rows; ``starts[kind]`` and ``lengths[kind]`` (S_kind, k): where
    segment j of sequence i of that kind begins among the packed rows, and how long it is, in the order given to
    :func:`pack`;
    ``order[kind]`` (S_kind,): which sequence stands at each place.
    """

    layout: SequenceLayout
    gather: Tensor
    starts: Mapping[str, np.ndarray]
    lengths: Mapping[str, np.ndarray]
    order: Mapping[str, np.ndarray]
    kinds: Mapping[str, slice]

    def rows_of(self, kind: str, segment: int) -> np.ndarray:
        """Packed rows of one segment of every sequence of a kind, sequences in the order given to :func:`pack`."""
        return ranges(self.starts[kind][:, segment], self.lengths[kind][:, segment])

    def per_sequence(self, kind: str, values: np.ndarray, fill: int = -1) -> np.ndarray:
        """Spread values of one kind's sequences (S_kind,) over all S sequences in layout order; the others get
        ``fill``."""
        spread = np.full(len(self.layout.lengths), fill, np.int64)
        spread[self.kinds[kind]] = np.asarray(values)[self.order[kind]]
        return spread


def pack(
    kinds: Mapping[str, Segments],
    source_rows: int,
    device: torch.device | str = "cpu",
    multiple: int = 1,
    max_rows: int | None = None,
) -> PackedSequences:
    """Plan a packed batch.

    Args:
        kinds: the sequences, by kind; kinds keep this order, sequences within a kind are sorted by length.
        source_rows: rows of the source tensor; row ``source_rows`` (one past the end) is the zero row that fills the
            tail, which :func:`gather_rows` appends.
        multiple: N is rounded up to a multiple of this.
        max_rows: an upper limit for N.

    Raises:
        ValueError: the batch is larger than ``max_rows``.
    """
    gathers, positions, totals = [], [], []
    starts: dict[str, np.ndarray] = {}
    lengths: dict[str, np.ndarray] = {}
    order: dict[str, np.ndarray] = {}
    slices: dict[str, slice] = {}
    base, count = 0, 0
    for kind, segments in kinds.items():
        total = segments.lengths.sum(axis=1)
        place = np.argsort(total, kind="stable")
        seg_starts, seg_lengths = segments.starts[place], segments.lengths[place]
        gathers.append(ranges(seg_starts.reshape(-1), seg_lengths.reshape(-1)))
        positions.append(ranges(np.zeros(seg_lengths.size, np.int64), seg_lengths.reshape(-1)))
        ends = base + np.cumsum(seg_lengths.reshape(-1))
        packed_starts = np.empty_like(segments.starts)
        packed_starts[place] = (ends - seg_lengths.reshape(-1)).reshape(seg_lengths.shape)
        starts[kind], lengths[kind], order[kind] = packed_starts, segments.lengths, place
        slices[kind] = slice(count, count + len(total))
        totals.append(total[place])
        base, count = base + int(total.sum()), count + len(total)
    if max_rows is not None and base > max_rows:
        raise ValueError(
            f"this step packs {base} positions "
            f"({', '.join(f'{k}: {int(s.lengths.sum())}' for k, s in kinds.items())}), the limit "
            f"model.max_positions is {max_rows}: lower the streams' frames_per_step or tokens_per_step, raise "
            "trainer.accumulate_grad_batches, or raise the limit if memory allows"
        )
    empty = np.zeros(0, np.int64)
    layout = SequenceLayout.build(
        np.concatenate(totals or [empty]), device, multiple, np.concatenate(positions or [empty])
    )
    tail = np.full(int(layout.lengths[-1]), source_rows, np.int64)
    gather = to_device(np.concatenate([*gathers, tail]), device)
    return PackedSequences(layout, gather, starts, lengths, order, slices)


def row_multiple(pad_multiple: int, device: torch.device) -> int:
    """What :func:`pack` rounds N up to, by the config: 1 on a CPU, which gains nothing from even shapes and would
    compute the tail's rows for nobody (batches there are small, so that 128 would be a tenth of them)."""
    return 1 if device.type == "cpu" else pad_multiple


def gather_rows(source: Tensor, gather: Tensor) -> Tensor:
    """Rows (N, D) of ``source`` (R, D) by index; index R is a zero row."""
    return torch.cat([source, source.new_zeros(1, source.shape[1])]).index_select(0, gather)
