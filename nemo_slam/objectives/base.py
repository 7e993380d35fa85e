"""What an objective is, and the loss it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_slam.objectives.inputs import MultimodalInput, SpeechInput, TextInput

if TYPE_CHECKING:
    from nemo_slam.models.step import EncodedSpeech, StepOutputs
    from nemo_slam.objectives.in_batch_negatives import ChosenTexts


@dataclass
class Loss:
    """A loss as (sum, count), so that averages are right over micro-batches and ranks of uneven size.

    A count of 0 comes with a sum of 0 that is still connected to every parameter of its objective: each rank then runs
    the same backward in each step.
    """

    name: str
    total: Tensor
    count: Tensor
    weight: float = 1.0


@dataclass
class Metric:
    """A figure to log, not to minimise, as (sum, count)."""

    name: str
    total: Tensor
    count: Tensor


@dataclass
class Histogram:
    """How often each code was a target, (K,); its entropy minus the loss named ``loss`` is the code information
    gain."""

    name: str
    counts: Tensor
    loss: str


@dataclass
class Pooled:
    """A figure that is no mean: ``figure`` of ``sums``, once these are added up over batches and ranks. *Shape:* the
    same in all of them."""

    name: str
    sums: Tensor
    figure: Callable[[Tensor], float]


@dataclass
class ObjectiveOutput:
    """Everything an objective returns for one micro-batch."""

    losses: list[Loss] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    pooled: list[Pooled] = field(default_factory=list)

    def extend(self, other: ObjectiveOutput) -> None:
        self.losses += other.losses
        self.metrics += other.metrics
        self.histograms += other.histograms
        self.pooled += other.pooled


class Objective(nn.Module):
    """Base class: declares inputs, then turns the encoders' outputs into losses and metrics.

    Attributes:
        name: prefix of its losses and of its random streams.
        streams: the data streams it needs.
        speech, text, multimodal: the sequences it adds to each packed batch.
    """

    name: str
    streams: tuple[str, ...] = ()
    speech: tuple[SpeechInput, ...] = ()
    text: tuple[TextInput, ...] = ()
    multimodal: tuple[MultimodalInput, ...] = ()

    def choose_texts(self, encoded: EncodedSpeech) -> dict[str, ChosenTexts]:
        """Texts of the batch to take in the place of an input's negatives, by the input's name: asked once the speech
        is encoded and before any text is."""
        return {}

    def forward(self, outputs: StepOutputs) -> ObjectiveOutput:
        raise NotImplementedError

    def _refer(self, name: str, module: nn.Module) -> None:
        """Keep a module that the model owns without registering it here: its parameters have one name, the model's."""
        object.__setattr__(self, name, module)


def count(value: int | Tensor, like: Tensor) -> Tensor:
    """A count as a scalar on the device of ``like``, in the loss's accumulation type; the device is not waited for."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over ranks, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_over_ranks(rows: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """The rows of all ranks end to end, rank 0's first, without gradient; and where this rank's begin.

    Every rank must call it, with as many rows as it has, none among them.

    Args:
        device: where ranks exchange tensors, which need not be where the rows are.

    *Shape:* (B, ...) -> (sum of all ranks' B, ...).
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows, 0
    rank, own = dist.get_rank(), rows.to(device)
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank] = len(own)
    dist.all_reduce(sizes)
    counts = sizes.tolist()
    padded = own.new_zeros(max(counts), *own.shape[1:])  # messages must be of one size
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    if len(padded):
        dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(rows.device), sum(counts[:rank])
