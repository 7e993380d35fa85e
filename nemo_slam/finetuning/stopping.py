"""Early stopping that keeps the best weights and survives a resume."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils import logging

from nemo_slam.training.checkpoints import StreamedCheckpointIO, fsync

MODES = ("min", "max")


class EarlyStopping(Callback):
    """Stops after ``patience`` validations without improvement; :meth:`restore_best` brings back the best weights.

    Lightning's own keeps no weights, and stops a run without saying what was best.

    Args:
        folder: where ``best.pt`` goes: the weights as they were at the best validation.
        patience: validations without improvement.
        monitor: a figure that the model logs in validation.
        mode: ``min`` or ``max``.
    """

    def __init__(self, folder: Path, patience: int, monitor: str, mode: str):
        if patience < 1 or mode not in MODES:
            raise ValueError(f"early_stopping: patience {patience} must be positive, mode {mode!r} one of {MODES}")
        self.path = folder / "best.pt"
        self.patience, self.monitor, self.mode = patience, monitor, mode
        self.best, self.best_step, self.waited = math.inf, -1, 0

    @property
    def stopped(self) -> bool:
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step, self.waited = (state_dict[key] for key in ("best", "best_step", "waited"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopped:  # a run that has stopped is not resumed; what else stops it, trainer.max_time, does so still
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that trainer.max_time stops validates once more, at no step of the interval: a resume must not know it.
        if trainer.sanity_checking or trainer.should_stop:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val_")))
            raise ValueError(f"early_stopping.monitor: validation logs no {self.monitor!r}, but {logged or 'nothing'}")
        value = float(trainer.callback_metrics[self.monitor])
        value = math.inf if math.isnan(value) else value if self.mode == "min" else -value
        if value < self.best:
            self.best, self.best_step, self.waited = value, trainer.global_step, 0
            if trainer.is_global_zero:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                part = self.path.with_suffix(".pt.part")
                best = {"step": self.best_step, "weights": pl_module.state_dict()}
                StreamedCheckpointIO().save_checkpoint(best, part)  # names the file and the room, where a disk is full
                fsync(part)
                os.replace(part, self.path)
            return
        self.waited += 1
        if self.stopped:
            logging.info(f"{self.monitor} has not improved for {self.waited} validations: stopping")
            trainer.should_stop = True

    def restore_best(self, model: LightningModule) -> int:
        """Load the best weights; returns their step, or -1 where no validation gave a number. All ranks call it."""
        model.trainer.strategy.barrier()  # rank 0 may still be writing them, of the last validation
        if self.best_step < 0:
            return -1
        found = torch.load(self.path, map_location="cpu", weights_only=True)
        model.load_state_dict(found["weights"])
        return int(found["step"])
