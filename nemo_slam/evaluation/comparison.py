"""Several seeds of several arms on the same test utterances: pooled scores and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_slam.evaluation.scoring import Options, check_references, read_transcripts
from nemo_slam.evaluation.text_metrics import (
    LOWER_IS_BETTER,
    Counts,
    Interval,
    bootstrap,
    count,
    normalise,
    paired_bootstrap,
)

RESAMPLES = 2000


def pooled(files: Sequence[str | Path], metric: str, reference: str, normalisation: str = "basic") -> list[Counts]:
    """Counts of each file's transcripts, the utterances in one order for all.

    Raises:
        ValueError: the files are not of the same utterances, or lack the reference.
    """
    counts, wanted = [], None
    for file in files:
        rows = sorted(read_transcripts(file), key=_identity)
        check_references(rows, Options((metric,), reference), str(file))
        found = [_identity(row) for row in rows]
        wanted = wanted or found
        if found != wanted:
            raise ValueError(f"{file} holds other utterances than {files[0]}: transcribe the same manifest with each")
        texts = [[normalise(row[key], normalisation) for row in rows] for key in (reference, "pred_text")]
        counts.append(count(metric, *texts))
    return counts


def _identity(row: Mapping[str, Any]) -> tuple[str, float]:
    return str(row.get("audio_filepath", "")), float(row.get("offset", 0.0))


def over_seeds(counts: Sequence[Counts]) -> Counts:
    """Each utterance's counts added up over seeds, so that a resample draws an utterance with all its seeds."""
    total = sum((c.per_utterance for c in counts[1:]), counts[0].per_utterance)
    return replace(counts[0], per_utterance=total)


def compare_arms(
    files: Mapping[str, Sequence[str | Path]], metrics: Sequence[str], reference: str, baseline: str
) -> dict[str, dict[str, Any]]:
    """Scores by arm, and each arm's difference from the baseline.

    Args:
        files: transcripts by arm, a file a seed.
        baseline: the arm that the others are compared with, where it is among them.

    Returns:
        By arm and metric: ``score`` (over all seeds) with its interval, ``seeds`` (each one's score), ``difference``
        (arm minus baseline, paired over utterances) with its interval, or None.
    """
    table: dict[str, dict[str, Any]] = {arm: {} for arm in files}
    for metric in metrics:
        own = {arm: pooled(paths, metric, reference) for arm, paths in files.items()}
        for arm, row in compare_counts(own, baseline).items():
            table[arm][metric] = row
    return table


def compare_counts(counts: Mapping[str, Sequence[Counts]], baseline: str) -> dict[str, dict[str, Any]]:
    """As `compare_arms`, of one metric's counts by arm, one of each seed, the utterances in one order for all."""
    together = {arm: over_seeds(own) for arm, own in counts.items()}
    table = {}
    for arm, own in counts.items():
        difference = None
        if arm != baseline and baseline in counts:
            difference = vars(paired_bootstrap(together[baseline], together[arm], RESAMPLES))
        table[arm] = {
            "score": vars(bootstrap(together[arm], RESAMPLES)),
            "seeds": [c.total() for c in own],
            "difference": difference,
            "utterances": len(own[0].per_utterance),
        }
    return table


def verdict(metric: str, difference: Interval) -> str:
    """Whether an interval of arm minus baseline is clear of zero, and on which side."""
    if difference.low <= 0 <= difference.high or difference.low != difference.low:
        return "not clear of zero"
    better = (difference.value < 0) == (metric in LOWER_IS_BETTER)
    return "better" if better else "worse"
