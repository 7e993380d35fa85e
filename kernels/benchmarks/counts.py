"""Bytes and operations that each operator cannot avoid: what the roofline is computed from.

Counted by hand from the kernels, for main memory: a value that neighbouring programs read again within microseconds
(halo rows, filters, a row's second read) is counted once, because it comes from a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

H100_BYTES_PER_SECOND = 3.0e12
"""What a copy reaches on an H100 SXM, the project's assumption where no run has measured it."""
H100_BF16_PER_SECOND = 800e12
H100_L2_BYTES_PER_SECOND = 5.5e12


@dataclass(frozen=True)
class Count:
    """Main-memory bytes, bytes served by the L2 cache beyond those, and bfloat16 matrix operations."""

    memory: float
    cache: float = 0.0
    matrix: float = 0.0

    def seconds(self, bytes_per_second: float = H100_BYTES_PER_SECOND) -> float:
        """The limit: the slowest of the three."""
        return max(
            self.memory / bytes_per_second,
            (self.memory + self.cache) / H100_L2_BYTES_PER_SECOND,
            self.matrix / H100_BF16_PER_SECOND,
        )

    def __add__(self, other: Count) -> Count:
        return Count(self.memory + other.memory, self.cache + other.cache, self.matrix + other.matrix)


def convolution(rows: int, channels: int, taps: int, itemsize: int, block: int = 64) -> tuple[Count, Count]:
    """Forward and backward of glu_conv_group_norm_silu; one unit is ``rows * channels * itemsize``.

    Forward: X twice (2 + 2), Z once (1). Backward: X and DZ twice (3 + 3), DX once (2). Besides, float32 partial sums a
    block of rows, written and read: 2 a channel for either norm pass, taps + 1 for the filter.
    """
    unit = rows * channels * itemsize
    partial = 2 * 4 * channels * rows / block
    return Count(5 * unit + 2 * partial), Count(8 * unit + (2 + taps + 1) * partial)


def eager_convolution_units() -> tuple[int, int]:
    """Units that PyTorch's own operators move on padded rows, forward and both, from GLU to SiLU.

    Not the PyTorch twin's, which computes on packed rows, tap by tap: the planner counts those.
    """
    return 12, 31


def compiled_convolution_units() -> tuple[int, int]:
    """Units that torch.compile's fusion moves, forward and both: an estimate from what it fuses."""
    return 8, 22


def pointwise(rows: int, channels: int, itemsize: int) -> tuple[Count, Count]:
    """The two projections around it, C to 2 C and C to C: forward and backward."""
    unit, weights = rows * channels * itemsize, 3 * channels * channels
    matrix = 2 * rows * weights
    return (
        Count(5 * unit + weights * itemsize, matrix=matrix),
        Count(8 * unit + weights * (itemsize + 4), matrix=2 * matrix),
    )


def masking(rows: int, width: int, itemsize: int) -> tuple[Count, Count]:
    """apply_spans: every row in and out once."""
    return Count(2 * rows * width * itemsize + 17 * rows), Count(2 * rows * width * itemsize + rows)


def noise(rows: int, columns: int, itemsize: int) -> Count:
    """gumbel_noise or sample_distractors: what is written. A word costs about 30 integer operations."""
    return Count(rows * columns * itemsize + 8 * rows)


def contrastive(rows: int, width: int, num: int, itemsize: int) -> tuple[Count, Count]:
    """span_contrastive. Vectors come from memory once, then ``num`` times a row from the L2 cache if they fit there.

    Backward gathers twice, once for either side, and sorts the int32 places of the distractors (8 passes of 12 bytes).
    """
    vectors, places = rows * width * itemsize, rows * num
    forward = Count(2 * 2 * vectors + 12 * places, cache=num * vectors)
    backward = Count(2 * 3 * vectors + (8 + 8 + 8 * 12) * places, cache=2 * num * vectors)
    return forward, backward


def cross_entropy(rows: int, width: int, vocab: int, itemsize: int) -> tuple[Count, Count]:
    """masked_cross_entropy: float32 logits written and read once either way, slopes written and read twice."""
    product, logits = 2 * rows * width * vocab, rows * vocab
    weights = vocab * width
    forward = Count(2 * 4 * logits + weights * itemsize + rows * width * itemsize, matrix=product)
    backward = Count(
        2 * 4 * logits + 3 * itemsize * logits + weights * (2 * itemsize + 2 * 4) + 3 * rows * width * itemsize,
        matrix=3 * product,
    )
    return forward, backward
