"""Rows of ``metrics.csv`` for fine-tuned models: stock ones have no account of their own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from nemo_slam.training.run_folder import RunMetrics


class FineTuneMetrics(RunMetrics):
    """Every ``every_n_steps`` steps: mean training loss, learning rates and speed, over all ranks; after validation:
    what it logged.

    Args:
        volume: the name of the speed, and what one unit of a batch's lengths counts: ``speech_per_second`` and seconds
            a sample, or ``tokens_per_second`` and 1.
    """

    def __init__(self, folder: Path, every_n_steps: int, volume: tuple[str, float]):
        super().__init__(folder, every_n_steps)
        self._volume_name, self._unit = volume
        self._sums = torch.zeros(4, dtype=torch.float64)  # losses, micro-batches, lengths, finite losses
        self._sound_at = 0  # the last row, or start, up to which every loss was finite
        self._without = 0  # rows since then that have no finite loss at all

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._sound_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning hands out the loss divided for accumulation.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        length = batch[1].sum().to(loss.device)
        new = torch.stack([loss.float(), torch.ones_like(loss).float(), length.float(), loss.isfinite().float()])
        self._sums = self._sums.to(new.device) + new
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _training_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        self._since = time.perf_counter()
        total, batches, lengths, finite = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        self._sums = torch.zeros_like(self._sums)
        self._watch(trainer, total, int(finite), int(batches))
        encoder = {id(parameter) for parameter in pl_module.encoder.parameters()}
        groups = trainer.optimizers[0].param_groups
        rates = {"lr_encoder" if id(group["params"][0]) in encoder else "lr": group["lr"] for group in groups}
        return {
            "loss": total / batches,
            **rates,
            self._volume_name: lengths * self._unit / seconds,
            "seconds": seconds,
        }

    def _watch(self, trainer: Trainer, total: float, finite: int, batches: int) -> None:
        """Stops, on all ranks alike, once two rows in a row have not one finite loss: weights that are NaN stay so, and
        each checkpoint to come would take the place of a good one. One that is finite shows that they are not."""
        self._without = 0 if finite else self._without + 1
        if finite == batches:
            self._sound_at = trainer.global_step
        if self._without == 2:
            raise RuntimeError(
                f"step {trainer.global_step}: the training loss is {total} for the second row in a row. Remove the "
                f"checkpoints in {self.file.path.parent / 'checkpoints'} from step {self._sound_at} on, and the same "
                "command goes on from the one before. Lower model.optim.lr or lengthen its warm-up; use bf16-mixed, "
                "not 16-mixed; +trainer.detect_anomaly=true names the operation"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        # Models log these summed or averaged over the ranks.
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        self._write(trainer, trainer.global_step, figures)
        self._go_on()

    @staticmethod
    def _line(step: int, last: int, figures: dict[str, float]) -> str:
        shown = [f"{name} {value:.4g}" for name, value in figures.items() if name != "seconds"]
        return f"step {step}/{last}: " + ", ".join(shown)
