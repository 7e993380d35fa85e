"""Scores of transcript files, over all and by group; ``scripts/evaluate.py`` calls this."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_slam.data.manifest import RowError, parse_json, scan_lines
from nemo_slam.evaluation.text_metrics import (
    LOWER_IS_BETTER,
    NORMALISATIONS,
    Counts,
    Interval,
    bootstrap,
    count,
    normalise,
    paired_bootstrap,
)


@dataclass(frozen=True)
class Options:
    """How to score.

    Attributes:
        metrics: of ``text_metrics.METRICS``.
        reference: the key of the lines that holds the reference.
        normalisation: one of ``text_metrics.NORMALISATIONS``, applied to both sides.
        by: the keys to group by, one after the other.
        resamples, seed: of the bootstrap.
    """

    metrics: tuple[str, ...]
    reference: str = "text"
    normalisation: str = "basic"
    by: tuple[str, ...] = ("lang", "corpus")
    resamples: int = 1000
    seed: int = 0


def read_transcripts(path: str | Path) -> list[dict[str, Any]]:
    """The lines of ``scripts/transcribe.py``.

    Raises:
        ValueError: a line that is not JSON in UTF-8, or has no ``pred_text``.
    """
    rows = []
    for number, _, raw in scan_lines(Path(path)):
        if raw.isspace():
            continue
        try:
            row = parse_json(raw)
        except RowError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        if not isinstance(row.get("pred_text"), str):
            raise ValueError(f"{path}:{number}: no string 'pred_text': expected lines of scripts/transcribe.py")
        rows.append(row)
    return rows


def check_references(rows: Sequence[dict[str, Any]], options: Options, where: str) -> None:
    """Every row must have a reference, which may be empty; a whole number, as labels may be, becomes its text.

    Raises:
        ValueError: one that has not, by its audio file, with the keys that it has.
    """
    for number, row in enumerate(rows, 1):
        audio = row.get("audio_filepath", "no audio_filepath")
        check_reference(row, options.reference, f"{where}, line {number} ({audio})")


def check_reference(row: dict[str, Any], reference: str, where: str) -> None:
    """:func:`check_references` of one row."""
    value = row.get(reference)
    if isinstance(value, int) and not isinstance(value, bool):
        row[reference] = str(value)
    elif not isinstance(value, str):
        keys = ", ".join(sorted(row)) or "no keys"
        raise ValueError(f"{where}: no string {reference!r} to score against; it has {keys} (choose with --reference)")


def _counts(metric: str, rows: Sequence[dict[str, Any]], options: Options) -> Counts:
    texts = [[normalise(row[key], options.normalisation) for row in rows] for key in (options.reference, "pred_text")]
    return count(metric, *texts)


def _groups(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {"all": list(range(len(rows)))}
    for key in by:
        found: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            found.setdefault(f"{key}={row.get(key, '?')}", []).append(number)
        if len(found) > 1:  # one group beside "all" says the same twice
            groups |= found
    return groups


def score(rows: Sequence[dict[str, Any]], options: Options) -> dict[str, Any]:
    """All scores, as JSON values: settings, and for each group its utterances, empty references and intervals."""
    groups = {}
    signatures: dict[str, str] = {}
    for name, members in _groups(rows, options.by).items():
        chosen = [rows[i] for i in members]
        empty = sum(not normalise(row[options.reference], options.normalisation) for row in chosen)
        scores = {}
        for metric in options.metrics:
            counts = _counts(metric, chosen, options)
            signatures[metric] = counts.signature
            scores[metric] = vars(bootstrap(counts, options.resamples, options.seed))
        groups[name] = {"utterances": len(chosen), "empty_references": empty, **scores}
    return {
        "normalisation": f"{options.normalisation}: {NORMALISATIONS[options.normalisation]}",
        "reference": options.reference,
        "interval": f"95%, bootstrap over utterances, {options.resamples} resamples, seed {options.seed}",
        "signatures": signatures,
        "groups": groups,
    }


def compare(
    rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], options: Options
) -> dict[str, dict[str, float]]:
    """Score of ``others`` minus score of ``rows`` on the utterances that both have, by paired bootstrap.

    Raises:
        ValueError: they have no utterance in common.
    """

    def identity(row: dict[str, Any]) -> tuple[Any, ...]:
        if "audio_filepath" in row:
            return os.path.abspath(row["audio_filepath"]), row.get("offset", 0.0)
        return tuple(sorted((key, str(value)) for key, value in row.items() if key != "pred_text"))  # texts

    second = {identity(row): row for row in others}
    shared = [(row, second[identity(row)]) for row in rows if identity(row) in second]
    if not shared:
        raise ValueError(
            "the two files have no utterance in common (compared by audio_filepath and offset, texts by all their keys)"
        )
    first_rows, second_rows = ([pair[i] for pair in shared] for i in (0, 1))
    differences: dict[str, dict[str, float]] = {}
    for metric in options.metrics:
        pair = (_counts(metric, first_rows, options), _counts(metric, second_rows, options))
        interval = paired_bootstrap(*pair, options.resamples, options.seed)
        differences[metric] = {**vars(interval), "utterances": len(shared)}
    return differences


def table(result: dict[str, Any]) -> str:
    """The scores for people: a line a group, a column a metric."""
    metrics = list(result["signatures"])
    arrows = {metric: f"{metric.upper()} {'v' if metric in LOWER_IS_BETTER else '^'}" for metric in metrics}
    rows = [["", "utterances", *arrows.values()]]
    for name, group in result["groups"].items():
        cells = [str(Interval(**group[metric])) for metric in metrics]
        rows.append([name, str(group["utterances"]), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    empty = result["groups"]["all"]["empty_references"]
    notes = [f"normalisation {result['normalisation']}", f"interval: {result['interval']}"]
    if empty:
        notes.append(f"{empty} empty reference(s): what was transcribed there counts as insertions")
    return "\n".join([*lines, *notes])
