"""Tar files in an object store, through fsspec: stretches of them by position, as of a file.

A store that does not answer is no bad row: it is asked again, and then ends the run.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nemo_slam.data.bad_rows import DataError

logger = logging.getLogger(__name__)

Source = Path | str
"""A file here, or the URL of one elsewhere."""

TRIES = 6
_HEADERS = 4096  # bytes of one request for a tar header: that of a short member brings the next one along
Result = TypeVar("Result")


class RemoteError(RuntimeError):
    """An object store that does not answer."""


def is_remote(source: Source) -> bool:
    """
    >>> is_remote("s3://bucket/audio_0.tar"), is_remote("audio_0.tar")
    (True, False)
    """
    return isinstance(source, str) and "://" in source


def fingerprint(url: str) -> list[Any]:
    """What changes when the file does: URL, size, and what the store knows of its content."""
    return ask(url, lambda fs, path: [url, int(fs.size(path)), 0, fs.ukey(path)])


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset`; fewer at the end."""
    return ask(url, lambda fs, path: fs.cat_file(path, start=offset, end=offset + size))


def with_file(url: str, read: Callable[[Any, int], Result]) -> Result:
    """What `read` makes of the file, open for small requests in any place, and of its size."""

    def opened(fs: Any, path: str) -> Result:
        with fs.open(path, "rb", block_size=_HEADERS, cache_type="readahead") as file:
            return read(file, int(fs.size(path)))

    return ask(url, opened)


def ask(url: str, question: Callable[[Any, str], Result]) -> Result:
    """What a file system and its name of the file answer; a remote one is asked again, with pauses, where it fails.

    Raises:
        DataError: no driver for such URLs is installed.
        FileNotFoundError: the file does not exist.
        RemoteError: no answer after all.
    """
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(url)  # made once a process: a connection does not survive a fork
    except (ImportError, ValueError) as error:
        raise DataError(f"cannot read {url}: {error}") from None
    if not is_remote(url):
        return question(fs, path)
    for attempt in range(TRIES):
        try:
            return question(fs, path)
        except DataError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
        except Exception as error:  # every store has errors of its own
            failed = error
            logger.warning("%s: %s: %s", url, type(error).__name__, error)
            if attempt < TRIES - 1:
                time.sleep(2**attempt)
    raise RemoteError(
        f"{url}: no answer after {TRIES} tries ({type(failed).__name__}: {failed}). The same command resumes from the "
        "last checkpoint"
    ) from failed
