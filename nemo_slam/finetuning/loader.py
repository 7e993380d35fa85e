"""Batches of fine-tuning, addressed by number like those of pre-training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from nemo.utils import logging
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nemo_slam.data.bad_rows import EmptyStreamError
from nemo_slam.data.loader import step_loader
from nemo_slam.data.sampling import StepSampler
from nemo_slam.data.stream import Stream
from nemo_slam.training.data_module import WithoutLength

Batch = tuple[Tensor, ...]
Collate = Callable[[Any], Batch]


class TrainingDataset(Dataset):
    """`dataset[m]` is micro-batch m of this rank, never empty: stock models cannot run on no utterance.

    A share without an example (more shares than examples, one example longer than a share or than the budget, bad rows
    only) becomes the next share of the step that has one, or of the next step: still a function of the number alone,
    and never larger than what some rank holds anyway.

    Args:
        stream: of examples.
        collate: examples to tensors.
        rank, world, accumulate: as in ``nemo_slam.data.loader.StepDataset``.
    """

    def __init__(self, stream: Stream, collate: Collate, rank: int = 0, world: int = 1, accumulate: int = 1):
        self.stream, self.collate = stream, collate
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.accumulate)
        part, parts = self.rank * self.accumulate + micro, self.world * self.accumulate
        for later in count():
            for other in range(parts):
                examples = self.stream.batch(step + later, (part + other) % parts, parts)
                if len(examples):
                    return self.collate(examples)
        raise AssertionError("a stream that has a row has a batch")


def validation_batches(sampler: StepSampler, world: int) -> list[list[np.ndarray]]:
    """Ids of every batch by rank, each example once, no share empty: stock models gather in every validation step.

    A batch of fewer examples than ranks joins the next (the last one, the one before).

    Raises:
        EmptyStreamError: fewer examples than ranks.
    """
    batches: list[np.ndarray] = [np.zeros(0, np.int64)]
    for step in range(sampler.steps_once):
        ids, _ = sampler.global_batch(step, once=True)
        if len(batches[-1]) < world:
            batches[-1] = np.concatenate([batches[-1], ids])
        else:
            batches.append(ids)
    if len(batches[-1]) < world and len(batches) > 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    if len(batches[-1]) < world:
        raise EmptyStreamError(f"validation has {len(batches[-1])} rows, too few for {world} ranks: give each one")
    lengths = sampler.index.lengths
    return [np.array_split(ids[np.lexsort((ids, lengths[ids]))], world) for ids in batches]


class ValidationShares(Dataset):
    """`dataset[k]` is this rank's share of validation batch k.

    Where none of a share can be loaded (bad audio), the first share that can stands in for it, which is said.
    """

    def __init__(self, stream: Stream, collate: Collate, rank: int = 0, world: int = 1):
        self.stream, self.collate, self.rank = stream, collate, rank
        self.batches = validation_batches(stream.sampler, world)
        self.warned: set[int] = set()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self.batches):
            raise IndexError(f"validation has {len(self.batches)} batches, asked for {number}")
        own = self.batches[number][self.rank]
        others = (share for batch in self.batches for share in batch)
        for ids in (own, *others):
            examples = self.stream.load(ids, np.zeros(len(ids), np.int64))
            if len(examples):
                break
        else:
            raise EmptyStreamError("validation: no row can be loaded; bad_rows.jsonl lists the reasons")
        if ids is not own and number not in self.warned:
            self.warned.add(number)
            logging.warning(
                f"validation: none of the {len(own)} rows of rank {self.rank}'s share of batch {number} can be loaded; "
                "rows of another share stand in and count twice. bad_rows.jsonl lists the reasons"
            )
        return self.collate(examples)


class FineTuningData(LightningDataModule):
    """Hands the trainer batch after batch, starting at the step that it has reached.

    Args:
        train, validation: open streams; validation may be None.
        collate: examples to the batch that the model takes.
        num_workers: loading processes.
        pin_memory: page-lock batches, for copies to a GPU.
    """

    def __init__(self, train: Stream, validation: Stream | None, collate: Collate, num_workers: int, pin_memory: bool):
        super().__init__()
        self.train, self.validation, self.collate = train, validation, collate
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def train_dataloader(self) -> WithoutLength:
        trainer = self.trainer
        assert trainer is not None
        accumulate = trainer.accumulate_grad_batches
        dataset = TrainingDataset(self.train, self.collate, trainer.global_rank, trainer.world_size, accumulate)
        start, end = trainer.global_step * accumulate, trainer.max_steps * accumulate
        return WithoutLength(step_loader(dataset, start, end, num_workers=self.num_workers, pin_memory=self.pin_memory))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        trainer = self.trainer
        assert trainer is not None
        if self.validation is None:
            return []
        dataset = ValidationShares(self.validation, self.collate, trainer.global_rank, trainer.world_size)
        # Validation reads little and seldom: no processes that would wait for it all along.
        return step_loader(dataset, 0, len(dataset), pin_memory=self.pin_memory)
