"""Rows of ``metrics.csv`` for stock models, which have no account of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from nemo_slam.data.audio import SAMPLE_RATE
from nemo_slam.training.run_folder import RunMetrics


class FineTuneMetrics(RunMetrics):
    """Every ``every_n_steps`` steps: mean training loss, learning rates and speed; after validation: what it logged."""

    def __init__(self, folder: Path, every_n_steps: int):
        super().__init__(folder, every_n_steps)
        self._losses: list[torch.Tensor] = []
        self._samples = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning hands out the loss divided for accumulation.
        self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        self._samples += int(batch[1].sum())
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _training_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        self._since = time.perf_counter()
        encoder = {id(parameter) for parameter in pl_module.encoder.parameters()}
        groups = trainer.optimizers[0].param_groups
        rates = {"lr_encoder" if id(group["params"][0]) in encoder else "lr": group["lr"] for group in groups}
        figures = {
            "loss": torch.stack(self._losses).mean().item(),
            **rates,
            "speech_per_second": self._samples / SAMPLE_RATE / seconds,
            "seconds": seconds,
        }
        self._losses, self._samples = [], 0
        return figures

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        self._write(trainer, trainer.global_step, figures)
        self._since = time.perf_counter()

    @staticmethod
    def _line(step: int, last: int, figures: dict[str, float]) -> str:
        shown = [f"{name} {value:.4g}" for name, value in figures.items() if name != "seconds"]
        return f"step {step}/{last}: " + ", ".join(shown)
