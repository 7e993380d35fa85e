"""Streams to Lightning: the training loader starts at the step that the trainer has reached."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from lightning.pytorch import LightningDataModule
from nemo.utils import logging
from torch.utils.data import DataLoader

from nemo_slam.data.batch import StepBatch
from nemo_slam.data.loader import StepDataset, ValidationDataset, step_loader
from nemo_slam.data.stream import Stream

T = TypeVar("T")
SLOW = 60.0
"""Seconds without a batch that are worth a warning."""


class WithoutLength:
    """Hides a loader's length: Lightning would count the batches before a resume against it and end the epoch early."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[StepBatch]:
        return told_when_slow(self.loader)


def told_when_slow(loader: Iterable[T], seconds: float = SLOW) -> Iterator[T]:
    """The loader's batches. A warning says that one has not come for so long, and again each time that it is as long.

    A wait has no end of its own: storage that hangs may come back. But a run that stands still must say why.
    """
    batches = iter(loader)  # before the thread: workers are forked here
    since: list[float | None] = [None]
    ended = threading.Event()

    def watch() -> None:
        begun, said = since[0], 0
        while not ended.wait(seconds / 4):
            if since[0] != begun:
                begun, said = since[0], 0
            if begun is not None and (waited := time.monotonic() - begun) >= (said + 1) * seconds:
                said += 1
                logging.warning(
                    f"no batch for {waited:.0f} s: the loader is slow or hangs. See where with py-spy dump --pid of a "
                    "worker; storage that hangs? data.num_workers=0 loads the same batches in this process"
                )

    threading.Thread(target=watch, daemon=True, name="slow loader").start()
    try:
        while True:
            since[0] = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            since[0] = None
            yield batch
    finally:
        ended.set()


class SLAMDataModule(LightningDataModule):
    """Hands the trainer micro-batch after micro-batch, each a function of its number.

    Args:
        train, validation: open streams by name.
        num_workers: loading processes.
        pin_memory: page-lock batches, for copies to a GPU.
    """

    def __init__(
        self, train: Mapping[str, Stream], validation: Mapping[str, Stream], num_workers: int, pin_memory: bool
    ):
        super().__init__()
        self.train, self.validation = train, validation
        self.options = {"num_workers": num_workers, "pin_memory": pin_memory}

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        """Lightning copies what it does not know without ``non_blocking``, which would leave pinned memory unused."""
        return batch.to(device, non_blocking=True)

    def train_dataloader(self) -> WithoutLength:
        assert self.trainer is not None
        accumulate = self.trainer.accumulate_grad_batches
        dataset = StepDataset(self.train, self.trainer.global_rank, self.trainer.world_size, accumulate)
        start, end = self.trainer.global_step * accumulate, self.trainer.max_steps * accumulate
        return WithoutLength(step_loader(dataset, start, end, **self.options))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        assert self.trainer is not None
        if not self.validation:
            return []
        dataset = ValidationDataset(self.validation, self.trainer.global_rank, self.trainer.world_size)
        # Validation reads little and seldom: no processes that would wait for it all along.
        return step_loader(dataset, 0, len(dataset), pin_memory=self.options["pin_memory"])
