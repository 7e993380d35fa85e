"""Rows that cannot be used: never a stopped run, never a silent loss.

Every bad row is listed once in the run folder's `bad_rows.jsonl`, whichever rank or loader worker met it, also after
a restart. `on_bad_row: raise` turns the first one into an error.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_LOGGED_ONE_BY_ONE = 20


class DataError(ValueError):
    """The data cannot be used as configured."""


class BadRowError(DataError):
    """A bad row was met and `on_bad_row` is 'raise'."""


class EmptyStreamError(DataError):
    """A stream has nothing to give."""


@dataclass(frozen=True)
class BadRow:
    """One unusable row: where it is and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class BadRows:
    """Counts, logs and lists bad rows.

    Args:
        path: the run folder's `bad_rows.jsonl`, or None to keep the list in memory only.
        on_bad_row: 'skip' or 'raise'.

    Each line of the file is `{"stream", "file", "line", "reason"}`, with `"step"` (the optimizer step) where the row
    was met while loading.
    """

    def __init__(self, path: str | Path | None = None, on_bad_row: str = "skip"):
        if on_bad_row not in ("skip", "raise"):
            raise DataError(f"on_bad_row must be 'skip' or 'raise', got {on_bad_row!r}")
        self.path = None if path is None else Path(path)
        self.on_bad_row = on_bad_row
        self._seen: set[tuple[str, str, int]] = set()
        self._position = 0

    @property
    def where(self) -> str:
        """Where to read about bad rows, for a message."""
        return str(self.path) if self.path is not None else "the log"

    def count(self) -> int:
        """Number of distinct bad rows that all processes of the run have met so far."""
        if self.path is not None and self.path.exists():
            with open(self.path, "rb") as file:
                self._catch_up(file)
        return len(self._seen)

    def record(self, stream: str, row: BadRow, step: int | None = None) -> None:
        """Lists one row. Raises BadRowError if `on_bad_row` is 'raise'."""
        self.record_all(stream, [row], step)

    def record_all(self, stream: str, rows: Iterable[BadRow], step: int | None = None) -> None:
        """Lists the rows that are not listed yet. Raises BadRowError at the first if `on_bad_row` is 'raise'."""
        rows = list(rows)
        if rows and self.on_bad_row == "raise":
            raise BadRowError(
                f"{rows[0]} (stream {stream!r}; data.on_bad_row is 'raise': mend or remove the row, "
                "or set data.on_bad_row=skip to leave such rows out)"
            )
        unseen = [row for row in rows if (stream, row.file, row.line) not in self._seen]
        if not unseen:
            return
        new = self._append(stream, unseen, step)
        for row in new[:_LOGGED_ONE_BY_ONE]:
            logger.warning("bad row in stream %r left out: %s", stream, row)
        if len(new) > _LOGGED_ONE_BY_ONE:
            logger.warning("... and %d more: see %s", len(new) - _LOGGED_ONE_BY_ONE, self.where)

    def _append(self, stream: str, rows: list[BadRow], step: int | None) -> list[BadRow]:
        """Adds rows that no process has listed, in one write under a file lock; returns them."""
        if self.path is None:
            return self._unlisted(stream, rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes
                ends_whole = self._catch_up(file)
                new = self._unlisted(stream, rows)
                extra = {} if step is None else {"step": step}
                lines = [
                    json.dumps({"stream": stream, "file": r.file, "line": r.line, "reason": r.reason, **extra})
                    for r in new
                ]
                # A kill inside an earlier write leaves half a line: do not glue ours to it.
                text = "".join(line + "\n" for line in lines)
                os.write(file.fileno(), (text if ends_whole else "\n" + text).encode()) if lines else None
                return new
        except OSError as error:
            logger.error("cannot write %s (%s): bad rows are only logged", self.path, error)
            return self._unlisted(stream, rows)

    def _unlisted(self, stream: str, rows: list[BadRow]) -> list[BadRow]:
        new = []
        for row in rows:
            key = (stream, row.file, row.line)
            if key not in self._seen:
                self._seen.add(key)
                new.append(row)
        return new

    def _catch_up(self, file) -> bool:
        """Reads what other processes have listed since the last look; says whether the file ends with a whole line."""
        file.seek(self._position)
        whole = True
        for line in file:
            whole = line.endswith(b"\n")
            if not whole:
                break
            self._position += len(line)
            try:
                row = json.loads(line)
                self._seen.add((row["stream"], row["file"], row["line"]))
            except (ValueError, KeyError, TypeError):
                continue  # half a line, from a kill inside a write
        return whole
