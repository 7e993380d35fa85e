"""Translations and labels of texts by fine-tuned models that read text; beside ``transcription``, which reads audio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_slam.data.manifest import RowError, parse_json, scan_lines, string_value
from nemo_slam.evaluation.transcription import MANIFEST_SUFFIXES, Item

if TYPE_CHECKING:
    from nemo_slam.finetuning.text_model import TextModel

_WINDOW = 512  # rows that are sorted by length together


def find_texts(inputs: Iterable[str | Path], keys: Sequence[str]) -> Iterator[Item]:
    """Rows of JSON-lines (all their keys are kept) and lines of text files, in order.

    Args:
        keys: those that hold the model's texts; a text file has one a line.
    """
    for given in map(Path, inputs):
        if not given.is_file():
            yield Item(str(given), given, problem=f"{given}: no such file; this model reads text: JSON-lines, or .txt")
            continue
        rows = given.suffix.lower() in MANIFEST_SUFFIXES
        if not rows and len(keys) > 1:
            yield Item(str(given), given, problem=f"{given}: this model reads JSON-lines with {', '.join(keys)}")
            continue
        for number, _, raw in scan_lines(given):
            if raw.isspace():
                continue
            item = Item(f"{given}:{number}", given)
            try:
                item.row = parse_json(raw) if rows else {keys[0]: raw.decode("utf-8").strip()}
                for key in keys:
                    string_value(item.row, key)
                item.row = {"corpus": given.stem, **item.row}
            except (RowError, UnicodeDecodeError) as error:
                item.problem = f"{item.source}: {error}"
            yield item


def answer(model: TextModel, items: Iterable[Item], batch_size: int = 8) -> Iterator[Item]:
    """Answers items and hands them on in order: ``row["pred_text"]`` is filled, or ``problem`` says why not."""
    keys, waiting = list(model.cfg.text_keys), iter(items)
    while window := list(islice(waiting, _WINDOW)):
        good = []
        for item in window:
            if item.problem is None:
                try:
                    model.encode_texts([[item.row[key].strip() for key in keys]])
                    good.append(item)
                except RowError as error:
                    item.problem = f"{item.source}: {error}"
        good.sort(key=lambda item: sum(len(item.row[key]) for key in keys))
        for start in range(0, len(good), batch_size):
            batch = good[start : start + batch_size]
            found = model.answer([[item.row[key].strip() for key in keys] for item in batch])
            for item, text in zip(batch, found, strict=True):
                item.row["pred_text"] = text
        yield from window
