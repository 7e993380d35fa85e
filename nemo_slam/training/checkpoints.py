"""Checkpoints of which a rerun can trust every one: written under another name, flushed, then renamed.

A checkpoint is named ``step_000001000.ckpt``. A kill at any moment leaves the previous one whole; a leftover of an
unfinished save ends in ``.part`` and is removed by the next start.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from nemo.utils import logging

from nemo_slam.training.parallel import of_every_rank

NAME = re.compile(r"step_(\d+)\.ckpt")


def finished_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every finished checkpoint, oldest first."""
    found = ((NAME.fullmatch(path.name), path) for path in folder.glob("step_*.ckpt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def fsync(path: Path) -> None:
    """Have the disk hold what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes straight to the file; Lightning's own composes the whole file in memory first, 7 GB for the paper's model.

    What it takes care of, that a file is whole or absent, `StepCheckpoint.save` does by renaming.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("checkpoints are written to a file; storage_options are not supported")
        try:
            torch.save(checkpoint, path)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise  # not of torch's writer, whose error names neither the file nor the disk
            free = shutil.disk_usage(Path(path).parent).free
            Path(path).unlink(missing_ok=True)
            raise OSError(
                f"cannot write the checkpoint {path}, {free / (1 << 20):.1f} MiB are left on its disk ({error}). Make "
                "room, or lower checkpoint.keep_last; the same command resumes from the newest finished checkpoint"
            ) from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuses a damaged file."""
        self.refuse_damaged(path)
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except RuntimeError as error:
            if "PytorchStreamReader" not in str(error):
                raise
            raise _damaged(path, str(error).splitlines()[0]) from error

    @staticmethod
    def refuse_damaged(path: Any) -> None:
        """Raises ValueError where a part of the file is not as it was written."""
        problem = find_damage(path)
        if problem is not None:
            raise _damaged(path, problem)


def find_damage(file: Any) -> str | None:
    """What in a file of ``torch.save`` is not as it was written: torch does not look at the checksums in it, and would
    read wrong weights. None if nothing is.

    Args:
        file: a path, or an open file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type for member in archive.infolist()):  # each decompressor has its own errors
                return "BadZipFile: a part of it is said to be compressed, and torch compresses none"
            wrong = archive.testzip()
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"  # bytes that mean something else
    return f"{wrong} does not match its checksum" if wrong else None


def _damaged(path: Any, problem: str) -> ValueError:
    return ValueError(
        f"the checkpoint {path} is damaged ({problem:.200}): remove it, and the same command resumes from the one "
        "before"
    )


def seed_dropout(seed: int, rank: int) -> None:
    """Each rank draws its own. Called once the weights are made, which are the same on all ranks."""
    torch.manual_seed(seed + rank)
    os.environ["PL_GLOBAL_SEED"] = str(seed + rank)  # Lightning seeds by this again when it connects the ranks


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def checkpoint_callback(trainer: Trainer) -> StepCheckpoint:
    """The trainer's :class:`StepCheckpoint`."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, StepCheckpoint))


def exit_if_terminated(trainer: Trainer) -> None:
    """After a SIGTERM that was answered by saving: end with the status of a terminated process.

    Not where Lightning has started this process beside rank 0: at any status but 0 it kills rank 0, whose own counts.
    """
    if not checkpoint_callback(trainer).terminated:
        return
    by_lightning = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    sys.exit(0 if by_lightning and trainer.local_rank > 0 else 128 + signal.SIGTERM)


class StepCheckpoint(Callback):
    """Saves every ``every_n_steps`` optimizer steps, at the end, early or not, and on SIGTERM; keeps ``keep_last``.

    Dropout draws from torch's generator, the one piece of randomness that is not a function of the step: every rank's
    state is saved, and restored right before the first batch after a resume.
    """

    identity: dict[str, Any] | None = None
    """What must be the same when a run is resumed, by name: the data and their order. None leaves it unchecked."""

    def __init__(self, folder: Path, every_n_steps: int, keep_last: int):
        if every_n_steps < 1 or keep_last < 1:
            raise ValueError(
                f"checkpoint.every_n_steps and keep_last must be positive, got {every_n_steps} and {keep_last}"
            )
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self._saved_at = -1
        self.terminated = False
        self._signalled = False
        self._random_state: list[dict[str, torch.Tensor]] | None = None
        self._random_at_step: dict[str, torch.Tensor] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = StreamedCheckpointIO()
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.part"):
                logging.warning(f"removing {leftover}: a save that was cut off")
                leftover.unlink()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = trainer.global_step
        # In place of Lightning's handler, which ends the process at the next batch without saving. Lightning puts back
        # what was there before the run; were its own handler put back here, the run's objects would stay alive.
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved_at:  # ended early, by trainer.max_time or for want of improvement
            self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where a kill came between the last save and the removal, the next start has nothing left to save.
        if trainer.is_global_zero:
            self._drop_old()

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._signalled = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = of_every_rank(self._random_at_step or _random_state())
        checkpoint["identity"] = self.identity
        # NeMo's copy of the config, objects that no weights-only reader takes; the run folder has it as config.yaml.
        for key in ("hyper_parameters", "hparams_name", "hparams_type"):
            checkpoint.pop(key, None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint.get("random_state")
        self._check_identity(checkpoint.get("identity"))
        # Lightning takes an optimizer step whenever this count is a multiple of accumulate_grad_batches, and the
        # loader starts at the same number: so both must follow a change of that setting.
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), batches))

    def _check_identity(self, saved: dict[str, Any] | None) -> None:
        if saved is None or self.identity is None or saved == self.identity:
            return
        names = [name for name in {**saved, **self.identity} if saved.get(name) != self.identity.get(name)]
        raise ValueError(
            f"{self.folder} holds checkpoints of a run with other data: {', '.join(names)} changed, so the steps "
            "that follow would repeat some examples and miss others. Put them back, or give the new run another name "
            "and start it with init_from"
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        states, self._random_state = self._random_state, None
        if states is None:
            return
        if len(states) == trainer.world_size:
            _set_random_state(states[trainer.global_rank])
        else:
            logging.warning(
                f"the checkpoint holds the dropout state of {len(states)} ranks, this run has {trainer.world_size}: "
                "dropout goes on from the seed; batches, masks and order are exact all the same"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved_at or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # A run that ends in the middle of an accumulated step goes on from that step's beginning.
        self._random_at_step = _random_state()
        stop = trainer.strategy.reduce_boolean_decision(self._signalled, all=False)
        if stop or step % self.every_n_steps == 0 or step == trainer.max_steps:
            self.save(trainer)
        if stop:
            self.terminated = True
            logging.warning(f"SIGTERM: saved step {step}, stopping; the same command resumes from here")
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning validates before it stops; a terminated run has no time for that

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of the current step, all ranks together, then drop the oldest beyond ``keep_last``."""
        step = trainer.global_step
        final = self.folder / f"step_{step:09d}.ckpt"
        part = final.with_suffix(".ckpt.part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            fsync(part)
            os.replace(part, final)
            fsync(self.folder)
            self._drop_old()
        # A rank that ends after a SIGTERM may make its launcher end rank 0, which must not be writing then.
        trainer.strategy.barrier()
        self._saved_at = step

    def _drop_old(self) -> None:
        for _, old in finished_checkpoints(self.folder)[: -self.keep_last]:
            old.unlink()
