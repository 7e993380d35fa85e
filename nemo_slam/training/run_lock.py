"""One live run in a run folder: a second would remove the first's unfinished save and write rows between its rows."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from nemo.utils import logging

from nemo_slam.config import ConfigError
from nemo_slam.training.guards import disk_advice

FILE_NAME = ".lock"


@contextmanager
def alone_in(folder: Path, is_global_zero: bool) -> Iterator[None]:
    """Within this block no other process's run writes to ``folder``; a kill of this process ends the block too.

    Args:
        folder: the run folder.
        is_global_zero: whether this is rank 0, which holds the lock for all ranks.

    Raises:
        ConfigError: another run is there.
    """
    if not is_global_zero:
        yield
        return
    with disk_advice(folder):
        file = (folder / FILE_NAME).open("a+", encoding="utf-8")
    with file:
        with disk_advice(folder):
            _lock(file, folder)
        yield


def _lock(file: TextIO, folder: Path) -> None:
    # A lock of the process (lockf), not of the open file (flock, and so filelock): loader workers would inherit that,
    # and as they outlive a killed run by seconds, its restart would be refused.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logging.warning(
                f"the run folder {folder} cannot be locked ({error.strerror}): nothing keeps a second run out of it"
            )
            return
        file.seek(0)
        raise ConfigError(
            f"the run folder {folder} is in use by another run ({file.read().strip() or 'it has just begun'}). End "
            "that one first, or give this one another name=NAME. If the other's machine is gone, and its lock is not, "
            f"remove {folder / FILE_NAME}"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n")
    file.flush()  # and never closed elsewhere in this process, which would end the lock


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
