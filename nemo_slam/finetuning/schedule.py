"""Learning rates by parameter group, each with its own peak, warm-up and start, and the encoder frozen at first.

NeMo's ``optim_param_groups`` gives groups their own peak, but its schedulers share one warm-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.config.schedulers import SchedulerParams
from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS, register_scheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

DECAYS = ("inverse_square_root", "cosine", "constant")


class GroupedWarmup(LRScheduler):
    """Linear warm-up to each group's peak, then a decay.

    A group may carry ``warmup_steps`` (default: the scheduler's) and ``frozen_steps`` (default 0): its rate is 0 for
    that many steps, and its warm-up begins after them.

    Args:
        warmup_steps: for groups without their own.
        decay: ``inverse_square_root`` (the Transformer's), ``cosine`` (to ``min_lr`` at ``max_steps``) or ``constant``.
        max_steps: of the run; ``cosine`` needs it.
        min_lr: never below this once a group is warm.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int = 0,
        decay: str = "inverse_square_root",
        max_steps: int | None = None,
        min_lr: float = 0.0,
        last_epoch: int = -1,
    ):
        if decay not in DECAYS:
            raise ValueError(f"model.optim.sched.decay: {decay!r} is not one of {', '.join(DECAYS)}")
        if decay == "cosine" and not max_steps:
            raise ValueError("model.optim.sched.decay: cosine needs the number of steps: set trainer.max_steps")
        self.warmup_steps, self.decay, self.max_steps, self.min_lr = warmup_steps, decay, max_steps, min_lr
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        return [self._rate(group, base) for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True)]

    def _rate(self, group: dict[str, Any], peak: float | Tensor) -> float | Tensor:
        frozen = group.get("frozen_steps", 0)
        warmup = group.get("warmup_steps", self.warmup_steps)
        step = self.last_epoch - frozen
        if step < 0:
            return 0.0
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        if self.decay == "constant":
            return peak
        if self.decay == "inverse_square_root":
            return max(peak * math.sqrt((warmup + 1) / (step + 1)), self.min_lr)
        assert self.max_steps is not None
        left = max(self.max_steps - frozen - warmup, 1)
        progress = min((step - warmup) / left, 1.0)
        return self.min_lr + (peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class GroupedWarmupParams(SchedulerParams):
    """The scheduler's arguments, as NeMo's registry wants them."""

    warmup_steps: int = 0
    decay: str = "inverse_square_root"
    max_steps: int | None = None
    min_lr: float = 0.0


if "GroupedWarmup" not in AVAILABLE_SCHEDULERS:
    register_scheduler("GroupedWarmup", GroupedWarmup, GroupedWarmupParams)


class FreezeEncoder(Callback):
    """Keeps ``encoder`` as it is for the first ``steps`` optimizer steps.

    Its gradients are dropped before clipping and the optimizer, rather than ``requires_grad`` switched:
    DistributedDataParallel reduces only the parameters that required a gradient when it was built.
    """

    def __init__(self, steps: int):
        if steps < 0:
            raise ValueError(f"freeze_encoder_steps must be 0 or more, got {steps}")
        self.steps = steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step < self.steps:
            for parameter in pl_module.encoder.parameters():
                parameter.grad = None
