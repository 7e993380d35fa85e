"""What one of several processes of ``test_parallel.py`` and ``test_parallel_finetuning.py`` runs: a whole run, as
torchrun would start it."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Record(Callback):
    """The first step's gradients and examples (of fine-tuning, whose batch is a tuple), the weights at the end, and
    what dropout is seeded with."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.examples = 0
        self.seed = 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.seed = torch.initial_seed()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 0 and isinstance(batch, tuple | list):
            self.examples = len(batch[1])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 0:
            self.gradients = {n: whole(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_end(self, trainer, pl_module) -> None:
        self.weights = {n: whole(p) for n, p in pl_module.named_parameters()}


def work(rank: int, world: int, port: int, cfg: Any, out: Path, module_name: str) -> None:
    """One rank of ``pretrain`` or ``finetune``, by the module that holds it; writes what it saw, or its error's text,
    to ``out/RANK.pt``."""
    module: Any = import_module(module_name)
    torch.set_num_threads(1)
    if world > 1:
        each = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        each |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({name: str(value) for name, value in each.items()})
    record, make_trainer = Record(), module.make_trainer

    def with_record(*args: Any) -> Any:
        trainer = make_trainer(*args)
        trainer.callbacks.append(record)
        return trainer

    module.make_trainer = with_record
    seen: dict[str, Any] = {"error": ""}
    try:
        getattr(module, module_name.rpartition(".")[2])(cfg)
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    seen |= {"gradients": record.gradients, "weights": record.weights, "examples": record.examples, "seed": record.seed}
    torch.save(seen, out / f"{rank}.pt")
