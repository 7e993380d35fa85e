"""What processors reach: makers' figures for dense arithmetic, cut to what large products and copies attain."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_slam.planning.operations import Precision

PRODUCT_SHARE, COPY_SHARE = 0.8, 0.9
"""Of a maker's peak: an assumption, about what large matrix products and copies are known to reach."""


@dataclass(frozen=True)
class Processor:
    """Attributes:
    memory: bytes.
    half: peak operations a second in bfloat16 and float16.
    single: the same in float32, without TF32, as PyTorch multiplies unless told otherwise.
    bandwidth: bytes a second of its memory.
    link: bytes a second to its neighbours in the machine, one way.
    network: bytes a second to other machines, one way, for each processor.
    """

    memory: float
    half: float
    single: float
    bandwidth: float
    link: float
    network: float

    def flops_per_second(self, precision: Precision) -> float:
        return PRODUCT_SHARE * (self.half if precision.compute == 2 else self.single)

    @property
    def bytes_per_second(self) -> float:
        return COPY_SHARE * self.bandwidth

    def reduction_bandwidth(self, ranks: int, per_node: int) -> float:
        """Bytes a second of a ring over all ranks: the machines' boundary is crossed by all its network cards."""
        across = self.network * min(ranks, per_node)
        return COPY_SHARE * (self.link if ranks <= per_node else min(self.link, across))


GPUS = {
    "a100": Processor(80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9),
    "h100": Processor(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Processor(141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "b200": Processor(180e9, 2250e12, 75e12, 8.0e12, 900e9, 50e9),
}
"""SXM modules: A100 80 GB with 200 Gb/s a GPU, the others with 400 Gb/s a GPU."""
