"""A training that ends itself by SIGKILL at a chosen moment; a module of its own, so that a fresh process can import
it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

MOMENTS = ("a step", "inside a save", "before the removal")
KILL_AT = 8
"""The step at whose checkpoint the kills inside a save happen; the others keep to it."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(cfg: Any, moment: str) -> None:
    """Runs pre-training until the moment comes."""
    from lightning.pytorch import Callback, Trainer

    from nemo_slam.training import checkpoints, pretrain

    if moment == "a step":

        class KillAtStep(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                if trainer.global_step == KILL_AT - 2:
                    kill()

        original = pretrain.make_trainer
        pretrain.make_trainer = lambda *args: with_callback(original(*args), KillAtStep())
    elif moment == "inside a save":
        save = Trainer.save_checkpoint

        def half(self, path, *args, **kwargs):
            save(self, path, *args, **kwargs)
            if self.global_step == KILL_AT:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
                kill()

        Trainer.save_checkpoint = half
    else:
        unlink = Path.unlink

        def killed(self, *args, **kwargs):
            if checkpoints.NAME.fullmatch(self.name):
                kill()
            unlink(self, *args, **kwargs)

        Path.unlink = killed
    pretrain.pretrain(cfg)


def with_callback(trainer: Any, callback: Any) -> Any:
    trainer.callbacks.append(callback)
    return trainer
