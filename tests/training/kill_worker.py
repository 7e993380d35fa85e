"""A training that ends itself by SIGKILL at a drawn moment; a module of its own, so that a fresh process can import
it."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, SAVE_EVERY = 12, 4
MOMENTS = ("a step", "inside a save", "before the removal")
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


@dataclass(frozen=True)
class Kill:
    """When the process dies. A repr says all, so that a failure can be repeated.

    Attributes:
        step: optimizer steps done by then; of a save, the step that is saved.
        hook: at a step: where in it.
        share: inside a save: how much of the file is there.
    """

    moment: str
    step: int
    hook: str
    share: float

    @classmethod
    def draw(cls, moment: str, seed: int) -> Kill:
        """Any step after the first checkpoint, any save after it."""
        generator = random.Random(f"{moment} {seed}")
        saves = range(2 * SAVE_EVERY, STEPS + 1, SAVE_EVERY)
        step = generator.choice(range(SAVE_EVERY, STEPS) if moment == MOMENTS[0] else saves)
        return cls(moment, step, generator.choice(HOOKS), generator.random())

    @property
    def kept(self) -> list[int]:
        """Steps of the finished checkpoints that it leaves, where one is kept; the rerun begins at the last."""
        if self.moment == MOMENTS[0]:
            return [self.step // SAVE_EVERY * SAVE_EVERY]
        return [self.step - SAVE_EVERY, *([self.step] if self.moment == MOMENTS[2] else [])]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(cfg: Any, when: Kill) -> None:
    """Runs pre-training until the moment comes."""
    from lightning.pytorch import Callback, Trainer

    from nemo_slam.training import pretrain

    if when.moment == "a step":

        def kill_at_step(trainer, *args):
            if trainer.global_step == when.step:
                kill()

        callback, original = Callback(), pretrain.make_trainer
        setattr(callback, when.hook, kill_at_step)
        pretrain.make_trainer = lambda *args: with_callback(original(*args), callback)
    elif when.moment == "inside a save":
        save = Trainer.save_checkpoint

        def part(self, path, *args, **kwargs):
            save(self, path, *args, **kwargs)
            if self.global_step == when.step:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: int(len(content) * when.share)])
                kill()

        Trainer.save_checkpoint = part
    else:
        unlink = Path.unlink

        def killed(self, *args, **kwargs):
            if self.name == checkpoint_name(when.step - SAVE_EVERY):
                kill()
            unlink(self, *args, **kwargs)

        Path.unlink = killed
    pretrain.pretrain(cfg)


def checkpoint_name(step: int) -> str:
    return f"step_{step:09d}.ckpt"


def with_callback(trainer: Any, callback: Any) -> Any:
    trainer.callbacks.append(callback)
    return trainer
