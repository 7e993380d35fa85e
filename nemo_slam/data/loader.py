"""From streams to batches in the training loop: a dataset addressed by micro-batch number, and its loader.

Micro-batch m of rank r belongs to step m // accumulate and is part r * accumulate + m % accumulate of
world * accumulate parts. A batch is a function of its number, so resuming means starting at another number; workers
only change who does the work.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nemo_slam.data.bad_rows import BadRows
from nemo_slam.data.batch import StepBatch
from nemo_slam.data.config import ConfigError, parse_streams
from nemo_slam.data.pairs import PairStream
from nemo_slam.data.shared_memory import share
from nemo_slam.data.speech import SpeechStream
from nemo_slam.data.stream import Stream
from nemo_slam.data.text import TextStream


def build_streams(
    node: Mapping[str, Any],
    *,
    seed: int,
    tokenizer: str | Path | None = None,
    bad_rows: BadRows | None = None,
    split: str = "train",
) -> dict[str, Stream]:
    """Opens the streams that a configuration node names; indexes are built on first use.

    Args:
        node: `{"speech": {...}, "text": {...}, "pairs": {...}}`, any of them; a dict or an OmegaConf node.
        seed: of the order and of the negatives.
        tokenizer: path of a SentencePiece model; needed for text and pairs.
        bad_rows: where unusable rows are listed.
        split: 'train', or what to call the streams otherwise: `<split>.speech` in messages and `bad_rows.jsonl`.
    """
    streams: dict[str, Stream] = {}
    bad_rows = bad_rows or BadRows()
    for kind, config in parse_streams(node, f"{split}_ds").items():
        name = kind if split == "train" else f"{split}.{kind}"
        options: dict[str, Any] = {"seed": seed, "bad_rows": bad_rows, "name": name}
        if kind == "speech":
            streams[kind] = SpeechStream(config, **options)
        elif tokenizer is None:
            raise ConfigError(f"{split}_ds.{kind} needs a tokenizer: set data.tokenizer.model_path")
        else:
            streams[kind] = {"text": TextStream, "pairs": PairStream}[kind](config, tokenizer, **options)
    return streams


class StepDataset(Dataset):
    """`dataset[m]` is micro-batch m of this rank, a `StepBatch`, for any m >= 0.

    Args:
        streams: by name: 'speech', 'text', 'pairs'; a missing one is None in every batch.
        rank: of this process.
        world: number of processes.
        accumulate: micro-batches in an optimizer step.
    """

    def __init__(self, streams: Mapping[str, Stream], rank: int = 0, world: int = 1, accumulate: int = 1):
        if not 0 <= rank < world or accumulate < 1:
            raise ValueError(f"rank ({rank}) must be below world ({world}), accumulate ({accumulate}) at least 1")
        self.streams = dict(streams)
        self.rank, self.world, self.accumulate = rank, world, accumulate

    def __getitem__(self, number: int) -> StepBatch:
        step, micro = divmod(number, self.accumulate)
        part, parts = self.rank * self.accumulate + micro, self.world * self.accumulate
        return StepBatch(step=number, **{n: s.batch(step, part, parts) for n, s in self.streams.items()})


class ValidationDataset(Dataset):
    """Fixed batches that cover every stream once; `dataset[k]` is this rank's share of batch k.

    All ranks have the same number of batches. Where one stream ends before another, its later batches are empty.

    Args:
        streams: as for `StepDataset`.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, streams: Mapping[str, Stream], rank: int = 0, world: int = 1):
        self.streams = dict(streams)
        self.rank, self.world = rank, world
        self._length = max(s.sampler.steps_once for s in self.streams.values())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> StepBatch:
        if not 0 <= number < self._length:
            raise IndexError(f"validation has {self._length} batches, asked for {number}")
        shares = {n: s.batch(number, self.rank, self.world, once=True) for n, s in self.streams.items()}
        return StepBatch(step=number, **shares)


def step_loader(
    dataset: Dataset,
    start: int,
    end: int,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of micro-batches start .. end - 1, in order. Its contents do not depend on the number of workers.

    Args:
        dataset: of this rank, addressed by number.
        start: first micro-batch number: where the run begins or resumes.
        end: one past the last.
        num_workers: processes that load; 0 to load in this one.
        pin_memory: page-lock batches for asynchronous copies to a GPU.
    """
    workers: dict[str, Any] = {}
    if num_workers:
        # Workers end with the last batch. Persistent ones are left to the garbage collector, which may close the files
        # of their queues under the threads that write to them.
        workers = {"worker_init_fn": _end_with_the_reader, "collate_fn": share}
    # A generator of its own: a loader draws its workers' base seed from the global one, which a resumed run must find
    # untouched.
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, end),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        **workers,
    )


def _end_with_the_reader(worker: int) -> None:
    """Called in a worker when it starts: lets it end as soon as the process that reads its batches has, killed or not,
    and by that one's SIGTERM alone.

    torch's own watch is for the worker's parent process. Under the forkserver, Python 3.14's default, that is another
    one, which lives as long as the workers do: after a SIGKILL all of them would stay for good. And a SIGTERM to every
    process of a job (Slurm, systemd) asks the reader to save: a worker that ended by it would end the reader first.
    (Only forked ones are safe from it: elsewhere imports have made threads before, which take it.)
    """
    reader = multiprocessing.parent_process()
    assert reader is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the threads to come too
    threading.Thread(target=_watch, args=(reader.sentinel,), daemon=True).start()
    threading.Thread(target=_listen, args=(reader.pid,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _listen(reader: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != reader:
        pass
    os._exit(0)
