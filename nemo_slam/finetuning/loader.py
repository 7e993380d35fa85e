"""Batches as stock NeMo models take them, addressed by number like those of pre-training."""

from __future__ import annotations

from itertools import count

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from nemo_slam.data.loader import step_loader
from nemo_slam.finetuning.transcripts import TranscriptStream, Utterances
from nemo_slam.training.data_module import WithoutLength

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def collate(utterances: Utterances, pad_id: int = 0, start_id: int | None = None, end_id: int | None = None) -> Batch:
    """What stock ASR models unpack in ``training_step``.

    *Shape:* signal (B, T) float32, signal lengths (B,), tokens (B, U) int64 padded with ``pad_id``, their lengths (B,).
    """
    before = [] if start_id is None else [start_id]
    after = [] if end_id is None else [end_id]
    tokens = [torch.tensor([*before, *row.tolist(), *after], dtype=torch.int64) for row in utterances.tokens]
    lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    return (
        utterances.audio,
        utterances.audio_lengths,
        torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=pad_id),
        lengths,
    )


class TranscriptDataset(Dataset):
    """`dataset[m]` is micro-batch m of this rank, never empty: stock models cannot run on no utterance.

    A share without an utterance (more ranks than utterances, one utterance longer than the budget, bad rows only)
    becomes the step's whole batch, or the next step's that has one: still a function of the number alone.

    Args:
        stream: of utterances.
        rank, world, accumulate: as in ``nemo_slam.data.loader.StepDataset``.
        once: cover the stream once (validation) instead of going round.
        special: ``pad_id``, ``start_id`` and ``end_id`` for `collate`.
    """

    def __init__(
        self,
        stream: TranscriptStream,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        once: bool = False,
        special: dict[str, int] | None = None,
    ):
        self.stream = stream
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.once = once
        self.special = special or {}

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.accumulate)
        part, parts = self.rank * self.accumulate + micro, self.world * self.accumulate
        utterances = self.stream.batch(step, part, parts, once=self.once)
        for later in count():
            if len(utterances):
                return collate(utterances, **self.special)
            utterances = self.stream.batch(step + later)
        raise AssertionError("a stream that has a row has a batch")


class FineTuningData(LightningDataModule):
    """Hands the trainer batch after batch, starting at the step that it has reached.

    Args:
        train, validation: open streams; validation may be None.
        num_workers: loading processes.
        pin_memory: page-lock batches, for copies to a GPU.
        special: see `TranscriptDataset`.
    """

    def __init__(
        self,
        train: TranscriptStream,
        validation: TranscriptStream | None,
        num_workers: int,
        pin_memory: bool,
        special: dict[str, int] | None = None,
    ):
        super().__init__()
        self.train, self.validation = train, validation
        self.num_workers, self.pin_memory, self.special = num_workers, pin_memory, special

    def train_dataloader(self) -> WithoutLength:
        trainer = self.trainer
        assert trainer is not None
        accumulate = trainer.accumulate_grad_batches
        dataset = TranscriptDataset(
            self.train, trainer.global_rank, trainer.world_size, accumulate, special=self.special
        )
        start, end = trainer.global_step * accumulate, trainer.max_steps * accumulate
        return WithoutLength(step_loader(dataset, start, end, num_workers=self.num_workers, pin_memory=self.pin_memory))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        trainer = self.trainer
        assert trainer is not None
        if self.validation is None:
            return []
        sampler = self.validation.sampler
        numbers = [n for n in range(sampler.steps_once) if len(sampler.global_batch(n, once=True)[0])]
        rank, world = trainer.global_rank, trainer.world_size
        dataset = TranscriptDataset(self.validation, rank, world, once=True, special=self.special)
        return step_loader(Subset(dataset, numbers), 0, len(numbers), pin_memory=self.pin_memory)
