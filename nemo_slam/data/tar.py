"""NeMo tarred audio: where each member of the tar files lies, so that rows are read by position, in any order."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.manifest import RowError
from nemo_slam.data.remote import Source, is_remote, with_file

_AT_ONCE = 32


class TarMembers:
    """The members of NeMo's tar files, by the name under which manifests know them.

    A row finds its member by its whole name or, as in NeMo, by base name without extension; rows that share a
    recording carry a `-sub<n>` suffix. Only headers are read.

    Args:
        paths: the tar files, or their URLs. A member that a truncated file does not hold completely is known, but
            unusable.
    """

    def __init__(self, paths: Sequence[Source]):
        self._members: dict[str, tuple[int, int, int]] = {}
        self._names: dict[str, list[str]] = {}  # base name without extension -> whole names
        self._broken: dict[str, Source] = {}
        self._damaged: list[str] = []
        # Headers of remote files come one request at a time: many files at once.
        with ThreadPoolExecutor(_AT_ONCE if any(is_remote(path) for path in paths) else 1) as pool:
            for number, (path, scanned) in enumerate(zip(paths, pool.map(_headers, paths), strict=True)):
                self._add(number, path, *scanned)

    def _add(self, number: int, path: Source, headers: list[tuple[str, int, int]], size: int, damage: str) -> None:
        for name, offset, length in headers:
            if name in self._members:
                raise DataError(f"{path} holds a second {name!r}: names must be unique over all tar files")
            if offset + length > size:
                self._broken[name] = path
            else:
                self._members[name] = (number, offset, length)
            self._names.setdefault(Path(name).stem, []).append(name)
        if damage:
            self._damaged.append(f"{path}: {damage}")

    def find(self, audio_filepath: str) -> tuple[int, int, int]:
        """Number of the tar file, byte offset and size of a row's audio. Raises RowError where there is none."""
        stem = Path(audio_filepath).stem
        named = [audio_filepath] if audio_filepath in self._members else self._names.get(stem)
        named = named or self._names.get(re.sub(r"-sub\d+$", "", stem), [])
        if len(named) > 1:
            raise RowError(f"{audio_filepath}: fits several members of the tar files: {', '.join(named[:3])}")
        for name in named:
            if name in self._broken:
                raise RowError(f"{audio_filepath}: cut off, {self._broken[name]} is truncated")
            return self._members[name]
        damaged = f" (not read to the end: {'; '.join(self._damaged)})" if self._damaged else ""
        raise RowError(f"{audio_filepath}: in none of the tar files{damaged}")


def _headers(path: Source) -> tuple[list[tuple[str, int, int]], int, str]:
    """Name, offset and size of each member of a tar file, the file's size, and why it was not read to the end."""
    try:
        if isinstance(path, str) and is_remote(path):
            return with_file(path, _read_headers)
        with open(path, "rb") as file:
            return _read_headers(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror})") from None


def _read_headers(file: Any, size: int) -> tuple[list[tuple[str, int, int]], int, str]:
    found = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    found.append((member.name, member.offset_data, member.size))
            end = tar.offset
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    except tarfile.ReadError as error:
        return found, size, str(error)
    # tarfile takes what is no header, behind the first one, for the end; at the end are blocks of zeros.
    whole = len(block) == tarfile.BLOCKSIZE and not any(block)
    return found, size, "" if whole else f"no header at byte {end}"
