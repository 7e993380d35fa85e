"""What one of several processes of ``test_parallel.py`` runs: a whole pre-training run, as torchrun would start it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Record(Callback):
    """The first step's gradients, and the weights at the end."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == 0:
            self.gradients = {n: whole(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_end(self, trainer, pl_module) -> None:
        self.weights = {n: whole(p) for n, p in pl_module.named_parameters()}


def work(rank: int, world: int, port: int, cfg: Any, out: Path) -> None:
    """One rank; writes what it saw, or its error's text, to ``out/RANK.pt``."""
    from nemo_slam.training import pretrain as module

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
        module.pretrain(cfg)
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    torch.save({**seen, "gradients": record.gradients, "weights": record.weights}, out / f"{rank}.pt")
