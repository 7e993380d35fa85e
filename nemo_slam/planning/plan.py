"""Memory, work and time of a run on given GPUs, and the batch that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_slam.planning.hardware import Processor
from nemo_slam.planning.network import Network, parameters
from nemo_slam.planning.operations import PRECISIONS, WEIGHT, Precision, Tally
from nemo_slam.planning.workload import MicroBatch, TypicalLengths, micro_batch

OPTIMIZER_VALUES = {"adam": 2, "adamw": 2, "fused_adam": 2, "auto": 2}
"""Values of state for each parameter."""
INPUT_BYTES_PER_FRAME = 160 * 4 + 2 * 80 * 4
"""Audio, and log-mel twice: padded, and laid end to end."""
USABLE = 0.9
"""Share of a GPU's memory that a plan fills: the rest is for CUDA, NCCL and fragmentation."""


@dataclass(frozen=True)
class Run:
    """A resolved config on given hardware.

    Attributes:
        config: of ``scripts/speech_pretrain.py``.
        gpu: what runs it.
        ranks: number of GPUs.
        per_node: GPUs in a machine.
        lengths: of the examples.
        fused: Triton's kernels.
        efficiency: share of the roofline's speed that is expected.
    """

    config: Mapping[str, Any]
    gpu: Processor
    ranks: int
    per_node: int = 8
    lengths: TypicalLengths = field(default_factory=TypicalLengths)
    fused: bool = True
    efficiency: float = 0.5

    @property
    def precision(self) -> Precision:
        name = str(self.config["trainer"]["precision"])
        if name not in PRECISIONS:
            raise ValueError(f"trainer.precision: {name!r} is not one of {', '.join(PRECISIONS)}, which can be planned")
        return PRECISIONS[name]

    @property
    def accumulate(self) -> int:
        count = int(self.config["trainer"]["accumulate_grad_batches"])
        if count < 1:
            raise ValueError(f"trainer.accumulate_grad_batches must be at least 1, got {count}")
        return count

    def batch(self, accumulate: int | None = None) -> MicroBatch:
        return micro_batch(self.config, self.lengths, self.ranks * (accumulate or self.accumulate))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part."""

    weights: float
    gradients: float
    optimizer: float
    copies: float
    inputs: float
    activations: float

    @property
    def fixed(self) -> float:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.copies

    @property
    def total(self) -> float:
        return self.fixed + self.inputs + self.activations


@dataclass(frozen=True)
class Plan:
    """Attributes:
    parameters: by part.
    memory: of one GPU.
    fits: with ``USABLE`` of the GPU's memory.
    accumulate: micro-batches that the step needs at least to fit; None if not even the weights do.
    flops, moved: of one GPU in one step: floating-point operations, bytes through its memory.
    seconds: of one step by the roofline: a lower limit.
    exposed: seconds of it in which gradients are waited for.
    tally: the operations of one micro-batch.
    """

    parameters: dict[str, int]
    memory: Memory
    fits: bool
    accumulate: int | None
    flops: float
    moved: float
    seconds: float
    exposed: float
    tally: Tally
    batch: MicroBatch


def tally_of(
    model: Mapping[str, Any],
    batch: MicroBatch,
    precision: Precision,
    *,
    fused: bool,
    mask_bytes: int = 1,
    fused_attention: bool = True,
) -> Tally:
    """The operations of a micro-batch; without fused attention and with a CPU's dropout masks for comparison."""
    tally = Tally(precision, mask_bytes, fused_attention)
    Network(model, tally, fused).add(batch)
    return tally


def memory_of(run: Run, batch: MicroBatch, tally: Tally) -> Memory:
    precision, optim = run.precision, run.config["model"]["optim"]["name"]
    if optim not in OPTIMIZER_VALUES:
        raise ValueError(
            f"model.optim.name: {optim!r} is not one of {', '.join(OPTIMIZER_VALUES)}, whose memory is known"
        )
    count = sum(parameters(run.config["model"]).values())
    weights = float(count * WEIGHT)
    # In the messages of DistributedDataParallel, or copied there.
    copied = run.ranks > 1 and not run.config["parallel"]["gradient_as_bucket_view"]
    return Memory(
        weights=weights,
        gradients=weights * (1 + copied),
        optimizer=OPTIMIZER_VALUES[optim] * weights,
        copies=float(count * precision.copies),
        inputs=batch.frames * INPUT_BYTES_PER_FRAME,
        activations=tally.total().saved,
    )


def make_plan(run: Run) -> Plan:
    """The plan of a run as its config says it."""
    model, accumulate = run.config["model"], run.accumulate
    strategy = run.config["parallel"]["strategy"]
    if strategy != "ddp":
        raise ValueError(f"parallel.strategy={strategy} cannot be planned: weights are taken to be whole on each GPU")
    batch = run.batch()
    tally = tally_of(model, batch, run.precision, fused=run.fused)
    memory = memory_of(run, batch, tally)
    room = USABLE * run.gpu.memory - memory.fixed
    # Activations grow with the batch, so that the whole step's tell how often it must be cut.
    whole = accumulate * (memory.inputs + memory.activations)
    needed = None if room <= 0 else max(1, -int(-whole // room))

    flops_per_second, bytes_per_second = run.gpu.flops_per_second(run.precision), run.gpu.bytes_per_second
    forward, backward = tally.seconds(flops_per_second, bytes_per_second)
    count = sum(parameters(model).values())
    # Norm and clipping read gradients and scale them; the optimizer reads all values and writes all but gradients.
    values = OPTIMIZER_VALUES[model["optim"]["name"]]
    update = count * WEIGHT * (4 + (2 + values) + (1 + values))
    reduction = 2 * (run.ranks - 1) / run.ranks * count * WEIGHT
    communication = reduction / run.gpu.reduction_bandwidth(run.ranks, run.per_node)
    exposed = max(0.0, communication - backward)  # it overlaps with the last micro-batch's backward
    total = tally.total()
    return Plan(
        parameters=parameters(model),
        memory=memory,
        fits=memory.total <= USABLE * run.gpu.memory,
        accumulate=needed,
        flops=accumulate * sum(total.products),
        moved=accumulate * sum(total.moved) + update,
        seconds=accumulate * (forward + backward) + update / bytes_per_second + exposed,
        exposed=exposed,
        tally=tally,
        batch=batch,
    )
