"""Operations of a step: floating-point operations, bytes moved through memory, and what autograd keeps of each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

SINGLE = 4
"""Bytes of float32: norms, losses and, without fused kernels, the inside of the convolution module."""


@dataclass(frozen=True)
class Precision:
    """Bytes of a value, by role.

    Attributes:
        residual: the residual stream and the norms' output.
        compute: matrix products and what lies between them.
        copies: bytes a weight of the copy that autocast makes of it; 0 without autocast.
    """

    residual: int
    compute: int
    copies: int


WEIGHT = 4
"""Bytes of a weight, its gradient, and each value of the optimizer's state."""

PRECISIONS = {
    "32-true": Precision(4, 4, 0),
    "bf16-mixed": Precision(4, 2, 2),
    "16-mixed": Precision(4, 2, 2),
}


@dataclass
class Cost:
    """Sums over operations. ``products`` are in matrix multiplications, by direction; ``moved`` in bytes."""

    products: list[float] = field(default_factory=lambda: [0.0, 0.0])
    moved: list[float] = field(default_factory=lambda: [0.0, 0.0])
    saved: float = 0.0

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> list[float]:
        """The roofline, forward and backward: the slower of arithmetic and memory."""
        return [max(p / flops_per_second, m / bytes_per_second) for p, m in zip(self.products, self.moved, strict=True)]


class Tally:
    """Collects costs by part of the network.

    Args:
        precision: of the run.
        mask_bytes: what dropout keeps for each value: one byte on a GPU, the noise itself on a CPU.
        fused_attention: its backward computes the scores again (FlashAttention); else they are kept.
    """

    def __init__(self, precision: Precision, mask_bytes: int, fused_attention: bool = True):
        self.precision, self.mask_bytes = precision, mask_bytes
        self.fused_attention = fused_attention
        self.operations: dict[str, list[Cost]] = defaultdict(list)
        self.part = "other"

    def add(
        self, products: tuple[float, float] = (0, 0), moved: tuple[float, float] = (0, 0), saved: float = 0
    ) -> None:
        self.operations[self.part].append(Cost(list(products), list(moved), saved))

    def linear(
        self,
        rows: float,
        inputs: float,
        outputs: float,
        *,
        saved: bool = True,
        input_bytes: int = 0,
        input_gradient: bool = True,
    ) -> None:
        """A projection. ``saved``: its input is kept for it alone; ``input_bytes``: as it is read, before a cast."""
        size = self.precision.compute
        product = 2 * rows * inputs * outputs
        weights = inputs * outputs * size
        flows = rows * (inputs * max(size, input_bytes) + outputs * size) + weights
        self.add(
            (product, product * (1 + input_gradient)),
            (flows, rows * (2 * outputs + (1 + input_gradient) * inputs) * size + 2 * weights),
            rows * inputs * size * saved,
        )

    def norm(self, rows: float, width: float, size: int = 0) -> None:
        """LayerNorm: keeps its input, mean and scale."""
        size = size or self.precision.residual
        self.add(moved=(2 * rows * width * size, 3 * rows * width * size), saved=rows * (width * size + 8))

    def elementwise(self, rows: float, width: float, size: int = 0, *, reads: int = 1, saved: int = 0) -> None:
        """Any function of one or more values, written once; ``saved`` of its tensors are kept."""
        size = size or self.precision.compute
        unit = rows * width * size
        self.add(moved=((reads + 1) * unit, (reads + 1 + saved) * unit), saved=saved * unit)

    def dropout(self, rows: float, width: float, probability: float) -> None:
        if probability:
            size, mask = rows * width * self.precision.compute, rows * width * self.mask_bytes
            self.add(moved=(2 * size + mask, 2 * size + mask), saved=mask)

    def attention(self, rows: float, squares: float, width: float, heads: int) -> None:
        """Attention proper: gathers of q, k and v, scores and sums, and the way back to packed rows."""
        size = self.precision.compute
        unit = rows * width * size
        product = 4 * squares * width
        scores = 0.0 if self.fused_attention else 2 * squares * heads * size
        self.add(moved=(6 * unit, 6 * unit), saved=3 * unit)
        self.add(
            (product, (2.5 if self.fused_attention else 2) * product),
            (4 * unit + scores, 8 * unit + 2 * scores),
            (unit if self.fused_attention else 0) + rows * heads * SINGLE + scores,
        )
        self.add(moved=(4 * unit, 4 * unit))

    def convolution(self, rows: float, width: float, taps: int, groups: int, sequences: float, fused: bool) -> None:
        """From GLU to SiLU. Units are (N, C) values read or written, of Triton's kernels or of their PyTorch twin."""
        size = self.precision.compute if fused else SINGLE
        unit = rows * width * size
        if fused:
            forward, backward = 5.0, 8.0  # as in kernels/benchmarks/counts.py
        else:
            # Operator by operator, each of which reads its operands from memory and writes its result there; what is
            # (N, G) and the rows between sequences are left out. K taps: a product, then K - 1 times a product added.
            # Forward: GLU 3, rows to spaced ones 3 (zeros, copy), taps 2 + 3 (K - 1), back 2, bias 2; norm: mean 1,
            # deviation 2, its square 2, mean 1, scale 2, affine 2; SiLU 2.
            # Backward: SiLU 3; norm: product 3, sums over rows 2, weight 4, means 2, shift 2, stretch 3, scale 2;
            # bias 1; to spaced rows 3, filter K (3 + 1), taps 2 + 3 (K - 1), back 2; GLU 5.
            forward, backward = 21.0 + 3 * taps, 31.0 + 7 * taps
            if self.precision.compute != size:  # (N, 2 C) to float32 and (N, C) from it, or the other way
                casts = 3 * (1 + self.precision.compute / size)
                forward, backward = forward + casts, backward + casts
        gaps = sequences * (taps // 2) * width * size
        saved = 2 * unit if fused else 5 * unit + gaps + rows * (SINGLE * groups + 16)
        self.add(moved=(forward * unit, backward * unit), saved=saved)

    def total(self, part: str | None = None) -> Cost:
        """Sum of a part, or of all."""
        result = Cost()
        for name, costs in self.operations.items():
            for cost in costs if part in (None, name) else ():
                for direction in (0, 1):
                    result.products[direction] += cost.products[direction]
                    result.moved[direction] += cost.moved[direction]
                result.saved += cost.saved
        return result

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> list[float]:
        """Sum of the operations' rooflines, forward and backward: one runs after the other."""
        totals = [0.0, 0.0]
        for cost in (c for costs in self.operations.values() for c in costs):
            for direction, seconds in enumerate(cost.seconds(flops_per_second, bytes_per_second)):
                totals[direction] += seconds
        return totals
