"""Bytes and operations that each operator cannot avoid: what the roofline is computed from.

    python kernels/benchmarks/counts.py        # the table of kernels/README.md, without torch

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


Counts = tuple[Count, ...]
"""Passes that follow one another, so that their limits add up."""


def seconds(passes: Counts, bytes_per_second: float = H100_BYTES_PER_SECOND) -> float:
    return sum(count.seconds(bytes_per_second) for count in passes)


def convolution(rows: int, channels: int, taps: int, itemsize: int, block: int = 64) -> tuple[Count, Count]:
    """Forward and backward of glu_conv_group_norm_silu; one unit is ``rows * channels * itemsize``.

    Forward: X twice (2 + 2), Z once (1). Backward: X and DZ twice (3 + 3), DX once (2). Besides, float32 partial sums a
    block of rows, written and read: 2 a channel for either norm pass, taps + 1 for the filter.
    """
    unit = rows * channels * itemsize
    partial = 2 * 4 * channels * rows / block
    return Count(5 * unit + 2 * partial), Count(8 * unit + (2 + taps + 1) * partial)


def stock_convolution(rows: int, channels: int, itemsize: int, compiled: bool) -> tuple[Count, Count]:
    """The same by PyTorch's own operators on padded rows, from GLU to SiLU: 12 units forward, 31 both.

    Or 8 and 22, an estimate from what torch.compile fuses. Not the PyTorch twin's, which computes on packed rows, tap
    by tap: the planner counts those.
    """
    forward, both = (8, 22) if compiled else (12, 31)
    unit = rows * channels * itemsize
    return Count(forward * unit), Count((both - forward) * unit)


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


def span_masks(rows: int) -> Count:
    """sample_spans: a byte a row is written."""
    return Count(rows)


def corruption(rows: int) -> Count:
    """corrupt_tokens: tokens in and out, the mask, and the list of what it hit."""
    return Count(33 * rows)


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


def table() -> list[str]:
    """Markdown: what operators move at the paper's shapes in bfloat16, and how long an H100 as assumed needs for it."""
    rows, width = 16 * 1600, 1024
    middle, around = convolution(rows, width, 5, 2), pointwise(rows, width, 2)
    stock = [stock_convolution(rows, width, 2, compiled) for compiled in (False, True)]
    return [
        "| operator (bfloat16) | shape | forward | forward + backward | limit, forward / both | PyTorch's / compiled |",
        "|---|---|---|---|---|---|",
        line("`glu_conv_group_norm_silu`", "B16 T1600 C1024 K5", middle, others=[[other] for other in stock]),
        line("convolution module", "same", middle, around, others=[[other, around] for other in stock]),
        line("`apply_spans`", "N 25,600 D 1024", masking(rows, width, 2)),
        line("`sample_spans`", "N 25,600", (span_masks(rows),)),
        line("`corrupt_tokens`", "N 25,600", (corruption(rows),)),
        line("`sample_distractors`", "M 12,500 K 100", (noise(12_500, 100, 8),)),
        line("`gumbel_noise`", "M 12,500 x 1,024", (noise(12_500, 1024, 4),)),
        line("`span_contrastive`", "M 16,384 D 1024 K 100", contrastive(16_384, width, 100, 2)),
        line("`masked_cross_entropy`", "M 4,096 D 1024 V 32,000", cross_entropy(4_096, width, 32_000, 2)),
        line("`masked_cross_entropy`", "M 8,192 D 1024 V 1,024", cross_entropy(8_192, width, 1024, 2)),
    ]


def line(name: str, shape: str, *parts: Counts, others: list[list[Counts]] | None = None) -> str:
    """A row of the table.

    Args:
        parts: of the operator, each (forward,) or (forward, backward).
        others: parts of slower ways to do the same, whose limits are given in that of ``parts``.
    """
    both = sum(parts, ())
    passes = [tuple(part[0] for part in parts), *([both] if len(both) > len(parts) else [])]
    limits = " / ".join(f"{seconds(counts) * 1e3:.3f}" for counts in passes)
    ratios = " / ".join(f"{seconds(sum(other, ())) / seconds(both):.1f}x" for other in others or [])
    return f"| {name} | {shape} | {' | '.join([*map(work, passes), ''][:2])} | {limits} ms | {ratios} |"


def work(passes: Counts) -> str:
    """What passes move and multiply, for a cell of the table."""
    memory, cache, matrix = (sum(getattr(c, name) for c in passes) for name in ("memory", "cache", "matrix"))
    found = [f"{memory / 1e6:,.0f} MB" if memory >= 1e6 else f"{memory / 1e6:.2f} MB"]
    found += [f"{cache / 1e9:.1f} GB from L2"] if cache else []
    found += [f"{matrix / 1e9:,.0f} GFLOP"] if matrix else []
    return ", ".join(found)


if __name__ == "__main__":
    print("\n".join(table()))
