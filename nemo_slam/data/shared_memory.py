"""How a loader worker hands over a batch: through shared memory, and with an error that the reader sees.

torch copies a batch to shared memory in a thread of the worker. Where that fails, in a container with 64 MB of
/dev/shm for instance, the thread prints an error and goes on, and the reader waits for ever. Here the copy is made
before, where an error ends the run with a sentence.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

FOLDER = "/dev/shm"
_MIB = 1 << 20


def share(batch: Any) -> Any:
    """The batch, its tensors moved to shared memory. Called in a worker, as its loader's ``collate_fn``.

    Raises:
        OSError: there is no room, or no file descriptor left.
    """
    for tensor in tensors_of(batch):
        if tensor.numel() and not tensor.is_shared():
            try:
                tensor.share_memory_()
            except RuntimeError as error:
                raise OSError(_explain(batch, error)) from error
    return batch


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor in dataclasses, sequences and mappings."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, field.name))
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(value)


def _explain(batch: Any, error: RuntimeError) -> str:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
    what = f"a loader worker cannot hand over a batch of {size / _MIB:.1f} MiB ({str(error).splitlines()[0]})"
    if "open files" in str(error):
        return f"{what}: raise the limit on open files (ulimit -n 65536), or set data.num_workers=0"
    try:
        disk = os.statvfs(FOLDER)
        room = (
            f"{FOLDER} has {disk.f_bavail * disk.f_frsize / _MIB:.1f} of {disk.f_blocks * disk.f_frsize / _MIB:.1f} MiB"
        )
    except OSError:
        room = f"{FOLDER} cannot be read"
    return (
        f"{what}. {room} free: enlarge it (docker run --shm-size=8g, or --ipc=host), or lower data.num_workers; with 0 "
        "nothing is handed over, and the batches are the same"
    )
