"""Guards of a long run: updates that would do harm are skipped and listed; running out of memory names the knobs."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils import logging
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_slam.data.config import STREAMS
from nemo_slam.objectives.base import sum_over_ranks, world_size
from nemo_slam.objectives.metrics import MetricAccumulator
from nemo_slam.training.parallel import of_every_rank

SHARED_MEMORY = Path("/dev/shm")
"""Where loader workers put batches, on Linux."""


class StepGuard(Callback):
    """Skips an update whose loss or gradient is not finite, or whose gradient norm is far above the usual.

    A skipped update leaves weights, optimizer state and the history of norms as they were; the step counts, so the
    data go on. What was skipped is listed in ``skipped_steps.jsonl``, with the examples of all ranks and micro-batches,
    and summed in the column ``skipped_steps`` of ``metrics.csv``. All ranks decide alike: loss flags and norms are
    summed over them, which costs one small reduction and one wait for the device in each step. The history is part of
    a checkpoint, so a resumed run decides as an unbroken one.

    Args:
        folder: the run folder.
        max_consecutive: as many skipped updates in a row stop the run.
        spike_factor: a norm above this multiple of the median of the last ``history`` norms is a spike; null for none.
        history: applied updates to remember; no spike is seen before there are as many.
    """

    def __init__(self, folder: Path, max_consecutive: int, spike_factor: float | None, history: int):
        if max_consecutive < 1 or history < 1:
            raise ValueError(
                f"guard.max_consecutive and guard.history must be positive, got {max_consecutive} and {history}"
            )
        if spike_factor is not None and not spike_factor > 1:
            raise ValueError(f"guard.spike_factor must be above 1 or null, got {spike_factor}")
        self.path = folder / "skipped_steps.jsonl"
        self.max_consecutive = max_consecutive
        self.spike_factor = spike_factor
        self.history = history
        self._norms: list[float] = []
        self._consecutive = 0
        self._examples: list[dict[str, tuple[Tensor, Tensor]]] = []  # ids and epochs of each micro-batch, by stream
        self._bad_loss: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "consecutive": self._consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Checkpoints of before hold the zeros of steps without an example too: nothing would push them out any more.
        self._norms, self._consecutive = [n for n in state_dict["norms"] if n > 0], state_dict["consecutive"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "guard: at precision 16-mixed the loss scaler skips updates itself; use bf16-mixed, or guard=null"
            )
        if trainer.is_global_zero and self.path.exists():
            # A resume repeats the steps after its checkpoint, and lists them again.
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            part = self.path.with_suffix(".jsonl.part")
            part.write_text("".join(line for line in whole if json.loads(line)["step"] <= trainer.global_step))
            os.replace(part, self.path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._examples, self._bad_loss = [], None
        # Not the batch: its audio would stay on the GPU until the step ends, 2 GB of the paper's step.
        parts = {name: getattr(batch, name) for name in STREAMS}
        self._examples.append({name: (part.ids, part.epochs) for name, part in parts.items() if part is not None})

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        bad = (~torch.isfinite(loss.detach())).double()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss + bad

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if isinstance(norm, DTensor):  # gradients in shards (parallel.strategy=fsdp2)
            norm = norm.full_tensor()
        assert self._bad_loss is not None
        flags = torch.stack([self._bad_loss.to(norm.device), norm.double()])
        bad, norms = sum_over_ranks(flags).tolist()
        reason = self._reason(bad, norms / world_size())
        metrics: MetricAccumulator = pl_module.train_metrics  # type: ignore[assignment]
        metrics.add("skipped_steps", (reason is not None) / world_size())
        if reason is None:
            self._consecutive = 0
            if norms > 0:  # a step without an example, where a budget is below an utterance, says nothing of the usual
                self._norms = [*self._norms, norms / world_size()][-self.history :]
            return
        for parameter in parameters:
            parameter.grad = None  # every optimizer of torch leaves such a parameter and its state alone
        self._consecutive += 1
        step = trainer.global_step + 1
        self._write(trainer, step, reason, norms / world_size())
        if self._consecutive >= self.max_consecutive:
            raise RuntimeError(
                f"step {step}: {self._consecutive} updates in a row were skipped, the last because {reason}. The "
                f"examples are in {self.path}. Lower model.optim.lr, leave bad examples out, or raise "
                "guard.spike_factor or guard.max_consecutive if this is as it should be"
            )

    def _reason(self, bad_losses: float, norm: float) -> str | None:
        if bad_losses:
            return "the loss is not finite"
        if not math.isfinite(norm):
            return "the gradient is not finite"
        if self.spike_factor is not None and len(self._norms) == self.history:
            usual = statistics.median(self._norms)
            if norm > self.spike_factor * usual:
                return f"the gradient norm {norm:.4g} is above {self.spike_factor:g} times its median {usual:.4g}"
        return None

    def _write(self, trainer: Trainer, step: int, reason: str, norm: float) -> None:
        own = {
            name: [
                [int(example), int(epoch)]
                for part in self._examples
                if name in part
                for example, epoch in zip(*part[name], strict=True)
            ]
            for name in STREAMS
        }
        shares = of_every_rank(own)
        if not trainer.is_global_zero:
            return
        examples = {name: [pair for share in shares for pair in share[name]] for name in STREAMS}
        record = {
            "step": step,
            "reason": reason,
            "gradient_norm": norm if math.isfinite(norm) else str(norm),
            "ids": {name: [example for example, _ in pairs] for name, pairs in examples.items()},
            "epochs": {name: [epoch for _, epoch in pairs] for name, pairs in examples.items()},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        logging.warning(f"step {step}: update skipped, {reason}; its examples are in {self.path}")


@contextmanager
def disk_advice(folder: Path) -> Iterator[None]:
    """Re-raise a full disk's error, which often names no file, with the room that is left and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # The folder may be what could not be made; not every system has shared memory as a file system.
        places = [next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())]
        shared = SHARED_MEMORY.exists()
        places += [SHARED_MEMORY] * shared
        rooms = [f"{place} has {shutil.disk_usage(place).free / (1 << 20):.1f} MiB" for place in places]
        workers = f" ({SHARED_MEMORY} is for loader workers: data.num_workers=0 does without it)" if shared else ""
        raise OSError(
            f"{error}: {', '.join(rooms)} left. Make room{workers}; the same command resumes from the newest finished "
            "checkpoint"
        ) from error


@contextmanager
def memory_advice(cfg: DictConfig) -> Iterator[None]:
    """Re-raise an out-of-memory error, of a GPU or of the CPU's allocator, with the settings that lower the need."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate" not in str(error):
            raise
        raise type(error)(f"{error}\n{_advice(cfg)}") from error


def _advice(cfg: DictConfig) -> str:
    accumulate = cfg.trainer.accumulate_grad_batches
    train = cfg.data.train_ds  # a stream, in fine-tuning, or streams by name
    nodes = {"data.train_ds": train}
    nodes |= {f"data.train_ds.{name}": node for name, node in train.items() if isinstance(node, DictConfig)}
    budgets = [
        f"{where}.{key} (now {node[key]})"
        for where, node in nodes.items()
        for key in ("frames_per_step", "tokens_per_step")
        if key in node
    ]
    bound = (
        " model.max_positions turns too large a batch into an error before it is computed."
        if "max_positions" in cfg.model
        else ""
    )
    return (
        "Out of memory. The examples of a step stay the same if trainer.accumulate_grad_batches is raised "
        f"(now {accumulate}; {2 * accumulate} halves a micro-batch). Otherwise lower {', '.join(budgets)}, or the "
        f"longest example by max_duration and max_tokens.{bound}"
    )
