"""Large corpora from folders that are here already: manifests and texts by part, written row by row."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from nemo_slam.data.corpora.files import CorpusError, sha256, whole_file, write_text
from nemo_slam.data.corpora.layout import Row, logger
from nemo_slam.data.corpora.splits import hash_fraction

PROGRESS_ROWS = 100_000
_AHEAD = 1024

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map`` with threads, in order, holding few results: reading headers waits for the disk."""
    waiting = iter(items)
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        while block := list(islice(waiting, _AHEAD)):
            yield from pool.map(function, block)


def write_parts(
    root: Path,
    about: Mapping[str, Any],
    rows: Iterable[tuple[tuple[str, ...], Row]] = (),
    lines: Iterable[tuple[str, str]] = (),
    left_out: Counter[str] | None = None,
) -> None:
    """Writes ``root``/manifests and ``root``/text, then ``corpus.json``, whose presence says that all is there.

    Args:
        root: the corpus folder.
        about: what ``corpus.json`` says besides: name, request, licences.
        rows: (names of the manifests that get the row, the row); nothing of them is kept.
        lines: (name of the text file, line).
        left_out: counts by reason, read when all rows and lines were.

    Raises:
        CorpusError: there was nothing to write.
    """
    speech: dict[str, dict[str, float]] = {}
    text: dict[str, int] = {}
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def file(name: str) -> Any:
            if name not in files:
                path = stack.enter_context(whole_file(root / name))
                files[name] = stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            return files[name]

        for number, (names, row) in enumerate(rows, 1):
            for name in names:
                file(f"manifests/{name}.json").write(json.dumps(row, ensure_ascii=False) + "\n")
                count = speech.setdefault(name, {"utterances": 0, "hours": 0.0})
                count["utterances"] += 1
                count["hours"] += row["duration"] / 3600
            if number % PROGRESS_ROWS == 0:
                logger.info("%s utterances", f"{number:,}")
        for number, (name, line) in enumerate(lines, 1):
            file(f"text/{name}.txt").write(line + "\n")
            text[name] = text.get(name, 0) + 1
            if number % (10 * PROGRESS_ROWS) == 0:
                logger.info("%s lines", f"{number:,}")
        if not files:
            raise CorpusError(f"nothing to prepare: everything was left out ({dict(left_out or {})})")
    for count in speech.values():
        count["hours"] = round(count["hours"], 4)
    marker = {
        **about,
        "synthetic": False,
        "speech": speech,
        "text": text,
        "left_out": dict(left_out or {}),
        "sha256": {name: sha256(root / name) for name in sorted(files)},
    }
    write_text(root / "corpus.json", json.dumps(marker, indent=2, ensure_ascii=False) + "\n")
    for name, count in speech.items():
        logger.info("%s: %d utterances, %.2f h", name, count["utterances"], count["hours"])
    for name, number in text.items():
        logger.info("%s: %d lines", name, number)


def held_out(key: str, share: float) -> bool:
    """Whether a document belongs to the share that is held out: a function of its key alone."""
    return hash_fraction(key) < share


def need_still(path: Path | None) -> None:
    """Raises CorpusError where a file that could be read before is gone: those that could not be read may be well."""
    if path is not None and not path.is_file():
        raise CorpusError(f"{path} is gone, and was there before: prepare again when its file system is back")


def need_folder(source: Path, what: str) -> None:
    """Raises CorpusError where there is no folder."""
    if not source.is_dir():
        raise CorpusError(f"{source} is not a folder: expected {what} (--source)")
