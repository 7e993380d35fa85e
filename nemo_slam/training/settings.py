"""After a resume the optimizer and its schedule are what the config says now, at the step that was reached."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils import logging

GROUP_PROGRESS = ("params", "step", "fused", "foreach", "capturable")
"""What of a parameter group is no setting; apex counts steps in a group. Nor is ``lr``, where a schedule sets it.

How torch computes, the last three, is where the restored state lies: another choice would not find it there.
"""
SCHEDULE_PROGRESS = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial")


class ConfiguredSettings(Callback):
    """Puts the config's settings back once states are restored, and says what has changed since.

    The states of torch's optimizers and schedules hold settings beside progress. So a run whose ``trainer.max_steps``
    was raised would go on with the schedule of the shorter one, which past its end is a rate of ``min_lr``: zero,
    where none is set. And a lower ``model.optim.lr`` would lower nothing.
    """

    def __init__(self) -> None:
        self._groups: list[dict[str, Any]] = []
        self._schedules: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Right before states are restored."""
        progress = (*GROUP_PROGRESS, "lr") if trainer.lr_scheduler_configs else GROUP_PROGRESS
        self._groups = [_settings(group, progress) for group in _groups(trainer)]
        self._schedules = [_settings(schedule.state_dict(), SCHEDULE_PROGRESS) for schedule in _schedules(trainer)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        changed: dict[str, str] = {}
        for group, configured in zip(_groups(trainer), self._groups, strict=True):
            changed |= _differences(group, configured)
            group.update(configured)
        for schedule, configured in zip(_schedules(trainer), self._schedules, strict=True):
            changed |= _differences(vars(schedule), configured)
            vars(schedule).update(configured)
        if not changed:
            return
        logging.info(f"resuming with other settings than before: {', '.join(changed.values())}")
        for schedule in _schedules(trainer):
            with warnings.catch_warnings():  # that this is not the place to ask
                warnings.simplefilter("ignore", UserWarning)
                rates = schedule.get_lr()
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _schedules(trainer: Trainer) -> list[Any]:
    """NeMo's and ours, whose rate is a function of the step; torch's own go on from the last rate."""
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [schedule for schedule in schedules if hasattr(schedule, "max_steps")]


def _settings(state: dict[str, Any], progress: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in progress}


def _differences(state: dict[str, Any], configured: dict[str, Any]) -> dict[str, str]:
    return {k: f"{k} {state.get(k)} -> {v}" for k, v in configured.items() if _plain(state.get(k)) != _plain(v)}


def _plain(value: Any) -> Any:
    """States of sharded optimizers come back with lists for tuples."""
    return list(value) if isinstance(value, tuple) else value
