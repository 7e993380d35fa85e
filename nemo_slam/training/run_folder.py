"""What a run leaves behind: metrics.csv, a line of progress for each logged step, figures for the loggers."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from logging import NullHandler, getLogger
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_slam.training.environment import write_environment

FRAME_SECONDS = 0.01


def make_run_folder(cfg: DictConfig) -> Path:
    """``exp_manager.exp_dir``/``name``, made if need be.

    Raises:
        OSError: it cannot be.
    """
    folder = Path(cfg.exp_manager.exp_dir) / cfg.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the run folder {folder} cannot be made ({error.strerror}): name another with exp_manager.exp_dir"
        ) from error
    return folder


def stop_keeping_log_lines() -> None:
    """NeMo keeps every line of its log in memory until ``exp_manager``, which we do without, gives it a file.

    The handlers stay: on ranks above 0 they are the only ones, and a logger without any writes warnings to stderr.
    """
    for handler in getLogger("nemo_logger").handlers:
        if isinstance(handler, MemoryHandler):
            handler.setTarget(NullHandler())
            handler.flush()


class MetricsFile:
    """A CSV file with ``step`` first that survives kills and resumes: rows are appended, columns may be added later."""

    def __init__(self, path: Path):
        self.path = path
        self.columns: list[str] = ["step"]

    def open_at(self, step: int) -> None:
        """Prepare for what follows a checkpoint at ``step``: later rows, and a last line that a kill cut short, are
        dropped.

        So is a validation at ``step`` itself, which Lightning repeats after a resume.
        """
        rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or ["step"])
                rows = [row for row in reader if None not in row.values() and _is_before(row, step)]
        self._rewrite(rows)

    def append(self, row: dict[str, Any]) -> None:
        new = [name for name in row if name not in self.columns]
        if new:
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            file.write(self._lines([row]))

    def _lines(self, rows: list[dict[str, Any]]) -> str:
        buffer = io.StringIO()
        csv.DictWriter(buffer, self.columns, restval="", lineterminator="\n").writerows(rows)
        return buffer.getvalue()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        part = self.path.with_suffix(".csv.part")
        part.write_text(",".join(self.columns) + "\n" + self._lines(rows))
        os.replace(part, self.path)


def _is_before(row: dict[str, str], step: int) -> bool:
    if not row["step"].isdigit():
        return False
    return int(row["step"]) < step or (int(row["step"]) == step and bool(row.get("loss")))


class SavedConfig(Callback):
    """Writes ``config.yaml``, resolved, once a run goes on: a start that is refused leaves the one before."""

    def __init__(self, cfg: DictConfig, folder: Path):
        self.cfg, self.folder = cfg, folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        part = self.folder / "config.yaml.part"
        OmegaConf.save(OmegaConf.create(OmegaConf.to_container(self.cfg, resolve=True)), part)
        os.replace(part, self.folder / "config.yaml")  # the one before stays whole where there is no room


class RunMetrics(Callback):
    """Every ``every_n_steps`` optimizer steps: one row in ``metrics.csv``, one line on the screen, figures to the
    loggers."""

    def __init__(self, folder: Path, every_n_steps: int):
        if every_n_steps < 1:
            raise ValueError(f"log_every_n_steps must be positive, got {every_n_steps}")
        self.file = MetricsFile(folder / "metrics.csv")
        self.every_n_steps = every_n_steps
        self._logged_at = -1
        self._since = self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged_at = trainer.global_step
        self._since = time.perf_counter()
        if trainer.is_global_zero:
            self.file.open_at(trainer.global_step)
            write_environment(self.file.path.parent)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        accumulated = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if accumulated and step != self._logged_at and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._logged_at = step
            self._write(trainer, step, self._training_figures(trainer, pl_module))

    def _training_figures(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        figures: dict[str, float] = pl_module.train_metrics.flush()
        seconds = time.perf_counter() - self._since
        self._since = time.perf_counter()
        positions, attended = figures.pop("positions"), figures.pop("attended_positions")
        frames, tokens = figures.pop("frames"), figures.pop("tokens")
        optimizer = trainer.optimizers[0]
        return {
            "loss": figures.pop("loss"),
            **figures,
            "lr": optimizer.param_groups[0]["lr"],
            "frames_per_second": frames / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_share": 1 - positions / attended if attended else 0.0,
            "seconds": seconds,
        }

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    def _go_on(self) -> None:
        """The time of a validation, which may lie anywhere between two rows, is not training's."""
        self._since += time.perf_counter() - self._paused

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        skipped = ("frames", "tokens", "positions", "attended_positions")
        figures = {k: v for k, v in pl_module.last_validation.items() if k.removeprefix("val_") not in skipped}
        self._write(trainer, trainer.global_step, figures)
        self._go_on()

    def _write(self, trainer: Trainer, step: int, figures: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in figures.items() if not math.isnan(v)}, step=step)
        if trainer.is_global_zero:
            self.file.append({"step": step, **{k: f"{v:.9g}" for k, v in figures.items()}})
            logging.info(self._line(step, trainer.max_steps, figures))

    @staticmethod
    def _line(step: int, last: int, figures: dict[str, float]) -> str:
        # What had no example in the interval is NaN in the file and not shown; a loss that is NaN is.
        shown = [
            f"{name.replace('masked_', '')} {value:.3f}"
            for name, value in figures.items()
            if _is_shown(name) and not (math.isnan(value) and "/" in name)
        ]
        rate = figures.get("frames_per_second")
        speed = (
            []
            if rate is None
            else [f"{rate * FRAME_SECONDS:.0f} s of speech/s", f"{figures['tokens_per_second']:.0f} tokens/s"]
        )
        return f"step {step}/{last}: " + ", ".join(shown + speed)


def _is_shown(name: str) -> bool:
    last = name.removeprefix("val_").rpartition("/")[2]
    return last in (
        "loss",
        "contrastive",
        "codes",
        "tokens",
        "matching",
        "ctc",
        "accuracy",
        "code_perplexity",
        "code_information_gain",
    )
