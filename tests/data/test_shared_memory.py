"""Loader workers without room to hand over their batches: an error that says so, not a reader that waits for ever."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from nemo_slam.data.batch import SpeechBatch, StepBatch
from nemo_slam.data.loader import step_loader
from nemo_slam.data.shared_memory import share, tensors_of


class Batches(Dataset):
    """Audio of 4 MB, in which each number stands for itself."""

    def __getitem__(self, number: int) -> StepBatch:
        ids = torch.from_numpy(np.array([number]))
        return StepBatch(number, SpeechBatch(torch.full((1, 1 << 20), float(number)), ids + 1, ids, ids))


def without_room(error: multiprocessing.Queue) -> None:
    """A shared-memory file counts for the limit on a file's size; a worker inherits it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        next(iter(step_loader(Batches(), 0, 4, num_workers=1)))
        error.put("no error")
    except Exception as caught:
        error.put(f"{type(caught).__name__}: {caught}")


def test_no_room_is_an_error_with_a_way_out():
    context = multiprocessing.get_context("fork")
    error = context.Queue()
    process = context.Process(target=without_room, args=(error,))
    began = time.monotonic()
    process.start()
    try:
        said = error.get(timeout=200)
    finally:
        process.kill()
        process.join()
    assert time.monotonic() - began < 200
    assert said.startswith("OSError")
    for part in ("a batch of 4.0 MiB", "/dev/shm has", "--shm-size", "data.num_workers"):
        assert part in said


def test_at_its_end_a_loader_leaves_nothing_to_the_garbage_collector(monkeypatch):
    """A run that had ended already, started again, reads no batch: queues that nothing was ever put into."""
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    threads = set(threading.enumerate())
    batches = iter(step_loader(Batches(), 5, 5, num_workers=2))
    workers = list(batches._workers)
    assert len(workers) == 2
    assert list(batches) == []
    for worker in workers:
        worker.join(timeout=60)  # torch waits for seconds, and goes on
    assert not any(worker.is_alive() for worker in workers)
    batches.itself = batches  # a run's objects, too, refer to each other
    del batches, workers
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=60)
    assert failed == []


def test_what_workers_hand_over_is_what_they_read():
    for number, batch in enumerate(step_loader(Batches(), 3, 6, num_workers=2), start=3):
        assert batch.step == number
        assert batch.speech.ids.tolist() == [number]
        assert (batch.speech.audio == number).all()
        assert batch.text is None


def test_every_tensor_is_found_and_shared():
    batch = StepBatch(0, Batches()[0].speech)
    nested = {"a": [batch, (torch.zeros(0), torch.ones(2))], "b": "text", "c": 7}
    assert len(list(tensors_of(nested))) == 6
    assert share(nested) is nested
    assert all(tensor.is_shared() for tensor in tensors_of(nested) if tensor.numel())


def test_a_limit_on_open_files_is_named(monkeypatch):
    def refuse(self):
        raise RuntimeError(
            "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(OSError, match="ulimit -n"):
        share(torch.ones(3))
