"""NeMo tarred audio: where each member of the tar files lies, so that rows are read by position, in any order."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.manifest import Row, RowError
from nemo_slam.data.remote import Source, is_remote, with_file

_AT_ONCE = 32
_NAMED = 3  # of many files, in a message
_MATCHING = 3  # raised when rows find their members in another way: what was indexed before must not be used
_COLUMNS = ("<i8", "<u4", "<i4", "<i8", "<i8")
_SUB = re.compile(r"^(.+)-sub\d+(\.\w+)?$")  # both as in NeMo
_SHARD = re.compile(r"audio[^/]*_(\d+)[^/]*\.tar")
_WAY_OUT = "rows name members as `tar -tf` does; take the manifest that was made with the tar files"


def identity(tars: Sequence[Source] | None) -> Any:
    """What an index of tarred rows depends on besides the files' content, for its settings."""
    return [len(tars), _MATCHING] if tars else 0


class TarMembers:
    """The members of NeMo's tar files, as the rows of manifests name them.

    A row finds the member of its whole name. For want of that, as NeMo's own files need it:

    - `a-sub1.wav`, a further row of one recording, finds `a.wav`;
    - the extension may differ, of audio that was encoded anew;
    - the member's whole name may be the end of the row's: `/data/spk1/utt.wav` finds `spk1/utt.wav` or `utt.wav`, never
      `spk2/utt.wav`.

    A row with a `shard_id` finds it in the tar file of that number alone, as in NeMo: a name may occur in every shard.

    Members are held as 40 bytes each: 64 bits of a hash stand for a name. Only headers are read.

    Args:
        paths: the tar files, or their URLs. A member that a truncated file does not hold completely is known, but
            unusable.
    """

    def __init__(self, paths: Sequence[Source]):
        self._paths = list(paths)
        self._shards = _shards(paths)
        self._damaged: list[str] = []
        columns: list[list[np.ndarray]] = [[np.zeros(0, dtype)] for dtype in _COLUMNS]
        # Headers come one request at a time, from an object store or a network file system: many files at once.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for number, (path, (found, damage)) in enumerate(zip(paths, pool.map(_headers, paths), strict=True)):
                stem, suffix, offset, size = found.T
                values = stem, suffix, np.full(len(found), number), offset, size
                for column, part in zip(columns, values, strict=True):
                    column.append(part.astype(column[0].dtype))
                if damage:
                    self._damaged.append(f"{path}: {damage}")
        # One column after the other, so that only one is held twice.
        stems = np.concatenate(columns.pop(0))
        order = np.argsort(stems, kind="stable")
        self._stems = stems[order]
        del stems
        self._suffixes, self._tars, self._offsets, self._sizes = (
            np.concatenate(columns.pop(0))[order] for _ in range(len(columns))
        )
        self._takers = np.zeros(len(order), np.int64)  # a hash of the rows' name, 0 before the first

    def find(self, row: Row) -> tuple[int, int, int]:
        """Number of the tar file, byte offset and size of a row's audio.

        Raises:
            RowError: there is none, or more than one.
            DataError: rows of different names find the same member: one of them has another's audio.
        """
        whole = _plain(row.audio_filepath)
        for name in _names(whole):
            stem, suffix = posixpath.splitext(name)
            if fitting := self._of_stem(_digest(stem), row.shard_id):
                break
        else:
            raise RowError(f"{row.audio_filepath}: in none of the tar files{self._why_not(row.shard_id)}: {_WAY_OUT}")
        chosen = [i for i in fitting if self._suffixes[i] == _checksum(suffix)] or fitting
        if len(chosen) != 1:
            files = list(dict.fromkeys(str(self._path(i)) for i in fitting))
            raise RowError(
                f"{row.audio_filepath}: fits {len(fitting)} members of the tar files, in {_some(files)}, and its "
                f"shard_id ({row.shard_id}) does not tell which: {_WAY_OUT}"
            )
        (member,) = chosen
        taker = _digest(_SUB.sub(r"\1\2", whole)) or 1
        if self._takers[member] not in (0, taker):
            raise DataError(
                f"{row.audio_filepath}: in {self._path(member)} it fits a member that a row of another name before it "
                f"fits too, {stem}.*: whose audio it is cannot be told. {_WAY_OUT.capitalize()}"
            )
        self._takers[member] = taker
        if self._sizes[member] < 0:
            raise RowError(f"{row.audio_filepath}: cut off, {self._path(member)} is truncated")
        return int(self._tars[member]), int(self._offsets[member]), int(self._sizes[member])

    def _of_stem(self, digest: int, shard_id: int | None) -> list[int]:
        first = end = int(np.searchsorted(self._stems, digest))
        while end < len(self._stems) and self._stems[end] == digest:
            end += 1
        return [i for i in range(first, end) if shard_id is None or self._shards[self._tars[i]] in (shard_id, None)]

    def _path(self, member: int) -> Source:
        return self._paths[self._tars[member]]

    def _why_not(self, shard_id: int | None) -> str:
        numbered = zip(self._paths, self._shards, strict=True)
        of_shard = [str(path) for path, number in numbered if number == shard_id is not None]
        said = f"its shard is {_some(of_shard)}; " if of_shard else ""
        if not of_shard and shard_id is not None and None not in self._shards:
            said = f"none of them is its shard, {shard_id}; "
        said += f"not read to the end: {_some(self._damaged)}; " if self._damaged else ""
        return f" ({said[:-2]})" if said else ""


def _plain(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _names(whole: str) -> Iterator[str]:
    """What a row's member may be called, extension apart; best first."""
    parts = whole.split("/")
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        yield name
        if name != (recording := _SUB.sub(r"\1\2", name)):
            yield recording


def _shards(paths: Sequence[Source]) -> list[int | None]:
    """The number that NeMo reads from each tar file's name, the `shard_id` of its rows.

    None where all have the same one, as in `audio_0_of_8.tar`: it is not theirs.
    """
    matches = [_SHARD.search(str(path)) for path in paths]
    numbers = [int(match[1]) if match else None for match in matches]
    return numbers if len(set(numbers)) > 1 or len(numbers) == 1 else [None] * len(numbers)


def _some(names: Sequence[str]) -> str:
    return "; ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _digest(name: str) -> int:
    raw = name.encode("utf-8", "surrogateescape")  # tarfile's way with bytes that are no UTF-8
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


def _checksum(suffix: str) -> int:
    return zlib.crc32(suffix.encode("utf-8", "surrogateescape"))


def _headers(path: Source) -> tuple[np.ndarray, str]:
    """What is kept of each member, and why a tar file was not read to the end.

    *Shape:* (n, 4) int64: hash of the name without extension, checksum of the extension, offset, size (-1: cut off).
    """
    try:
        if isinstance(path, str) and is_remote(path):
            return with_file(path, _read_headers)
        with open(path, "rb") as file:
            return _read_headers(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror})") from None


def _read_headers(file: Any, size: int) -> tuple[np.ndarray, str]:
    found = array("q")
    damage = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isfile():
                    stem, suffix = posixpath.splitext(_plain(member.name))
                    whole = member.offset_data + member.size <= size
                    length = member.size if whole else -1
                    found.extend((_digest(stem), _checksum(suffix), member.offset_data, length))
                tar.members.clear()  # type: ignore[attr-defined]  # which it keeps for a second pass
            end = tar.offset
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        # tarfile takes what is no header, behind the first one, for the end; at the end are blocks of zeros.
        if len(block) < tarfile.BLOCKSIZE or any(block):
            damage = f"no header at byte {end}"
    except tarfile.ReadError as error:
        damage = str(error)
    return np.array(found, np.int64).reshape(-1, 4), damage
