"""NeMo JSON-lines manifests: which rows are usable, where they lie, and how to read one again."""

from __future__ import annotations

import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.remote import Source, is_remote, read_range

LONGEST_SECONDS = 20_000_000.0
"""More than that, in frames of 10 ms, is too large for the 32 bits of an index."""

_OPEN_FILES = 64
_BOM = b"\xef\xbb\xbf"


class RowError(ValueError):
    """A row that cannot be used; the message is the reason, without file and line."""


@dataclass(frozen=True)
class Row:
    """One utterance of a manifest. Times in seconds; `text` and `lang` are empty where the manifest has none.

    `shard_id` is the number of the tar file in NeMo's tarred manifests.
    """

    audio_filepath: str
    duration: float
    offset: float = 0.0
    text: str = ""
    lang: str = ""
    shard_id: int | None = None


def parse_json(raw: bytes) -> dict:
    """A line of JSON as a dict. Raises RowError with the reason."""
    try:
        row = json.loads(raw.decode("utf-8").rstrip(" \t\r\n"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start})") from None
    except json.JSONDecodeError as error:
        raise RowError(f"malformed JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise RowError(f"malformed JSON ({error!s:.80})") from None
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, got {type(row).__name__}")
    return row


def parse_row(raw: bytes, need_text: bool) -> Row:
    """A line of a manifest as a Row. Raises RowError with the reason."""
    row = parse_json(raw)
    path = string_value(row, "audio_filepath")
    duration, offset = duration_of(row), offset_of(row)
    text = string_value(row, "text").strip() if need_text else ""
    lang = row.get("lang")
    shard = row.get("shard_id")
    shard_id = shard if isinstance(shard, int) and not isinstance(shard, bool) else None
    return Row(path, duration, offset, text, lang if isinstance(lang, str) else "", shard_id)


def string_value(row: dict, key: str) -> str:
    """A key's non-empty string. Raises RowError where there is none."""
    if key not in row:
        raise RowError(f"missing key {key!r}")
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"{key} must be a string, got {value!r:.80}")
    if not value.strip():
        raise RowError(f"{key} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{key} holds half a surrogate pair, which is no character") from None
    return value


def duration_of(row: dict) -> float:
    """Seconds, above 0. Raises RowError where it is not that."""
    duration = _seconds(row, "duration")
    if duration <= 0:
        raise RowError(f"duration must be above 0, got {duration:g}")
    return duration


def offset_of(row: dict) -> float:
    """Seconds, 0 where there is none. Raises RowError where it is not that."""
    offset = _seconds(row, "offset") if row.get("offset") is not None else 0.0
    if offset < 0:
        raise RowError(f"offset must be at least 0, got {offset:g}")
    return offset


def _seconds(row: dict, key: str) -> float:
    if key not in row:
        raise RowError(f"missing key {key!r}")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{key} must be a number of seconds, got {value!r:.80}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise RowError(f"{key} must be finite, got {seconds}")
    if seconds > LONGEST_SECONDS:
        raise RowError(f"{key} must be at most {LONGEST_SECONDS:.0f} s, got {seconds:g}")
    return seconds


def scan_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Every line of a file: its number (from 1), its byte offset, and its bytes without a byte-order mark."""
    with open(path, "rb") as file:
        offset = 0
        for number, raw in enumerate(file, start=1):
            start = offset
            offset += len(raw)
            if number == 1 and raw.startswith(_BOM):
                start, raw = len(_BOM), raw[len(_BOM) :]
                if not raw:  # nothing but the mark
                    return
            yield number, start, raw


class Files:
    """Reads stretches of files by position, keeping a few of them open; of URLs too. Safe across forks; pickles without
    them."""

    def __init__(self, paths: Sequence[Source]):
        self.paths = [p if is_remote(p) else Path(p) for p in paths]
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "_open": OrderedDict()}

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of file `number`; fewer at the end of the file."""
        path = self.paths[number]
        if isinstance(path, str):
            return read_range(path, offset, size)
        if number in self._open:
            self._open.move_to_end(number)
        else:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(path, os.O_RDONLY)
        parts = []
        while size > 0 and (part := os.pread(self._open[number], size, offset)):  # one call gives at most 2 GiB
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Closes what is open; a later read opens it again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self):
        self.close()


def expand_paths(patterns: Sequence[str]) -> list[Path]:
    """Paths with their ranges written out: `a_{0..3}.json`, and NeMo's `a__OP_0..3_CL_.json`.

    >>> [str(p) for p in expand_paths(["a__OP_0..2_CL_.tar", "b.tar"])]
    ['a_0.tar', 'a_1.tar', 'a_2.tar', 'b.tar']
    """
    sources = expand_sources(patterns)
    for source in sources:
        if is_remote(source):
            raise DataError(f"{source}: only the tar files of speech and pairs may lie elsewhere; copy this file here")
    return [Path(source) for source in sources]


def expand_sources(patterns: Sequence[str]) -> list[Source]:
    """The same, where URLs may be among them: `s3://bucket/a_{0..3}.tar`. They stay strings."""
    paths = []
    for pattern in patterns:
        plain = re.sub(r"(_OP_|[(\[<{])(\d+\.\.\d+)(_CL_|[)\]>}])", r"{\2}", pattern)
        paths += _expand(plain)
    repeated = [p for p in paths if paths.count(p) > 1] if len(set(paths)) < len(paths) else []
    if repeated:
        raise DataError(f"{repeated[0]} is listed more than once")
    return [p if is_remote(p) else Path(os.path.expanduser(p)) for p in paths]


def _expand(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    width = len(first) if first.startswith("0") and len(first) > 1 else 0
    if int(last) < int(first):
        raise DataError(f"the range {match.group()} in {pattern!r} runs backwards")
    return [
        path
        for number in range(int(first), int(last) + 1)
        for path in _expand(f"{pattern[: match.start()]}{number:0{width}d}{pattern[match.end() :]}")
    ]


def audio_path(manifest: Path, row: Row) -> Path:
    """Where a row's audio lies: relative paths are taken from the manifest's folder. Raises RowError for no path."""
    if "\0" in row.audio_filepath:
        raise RowError("audio_filepath holds a null character, which no path does")
    return manifest.parent / os.path.expanduser(row.audio_filepath)
