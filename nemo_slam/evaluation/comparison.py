"""Several seeds of several arms on the same test utterances: pooled scores, paired differences, and a page of them."""

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
        together = {arm: over_seeds(counts) for arm, counts in own.items()}
        for arm, counts in own.items():
            difference = None
            if arm != baseline and baseline in own:
                difference = vars(paired_bootstrap(together[baseline], together[arm], RESAMPLES))
            table[arm][metric] = {
                "score": vars(bootstrap(together[arm], RESAMPLES)),
                "seeds": [c.total() for c in counts],
                "difference": difference,
                "utterances": len(counts[0].per_utterance),
            }
    return table


def verdict(metric: str, difference: Interval) -> str:
    """Whether an interval of arm minus baseline is clear of zero, and on which side."""
    if difference.low <= 0 <= difference.high or difference.low != difference.low:
        return "not clear of zero"
    better = (difference.value < 0) == (metric in LOWER_IS_BETTER)
    return "better" if better else "worse"


def page(study: Mapping[str, Any]) -> str:
    """``docs/results.md`` of a study."""
    steps, seeds = study["steps"], study["seeds"]
    lines = [
        "# Results: does pre-training help?",
        "",
        "Made by `make study` (`benchmarks/study.py`); the numbers are in `study.json`, with every command.",
        "",
        "**One speaker a language.** The corpus is telephone prompts, English and Spanish read by the same person, and "
        "those who read the training data read the test utterances (up to 10 s) too. These figures compare ways to "
        "start; they do not say how well anything recognises speech.",
        "",
        f"Tiny models. Fine-tuning: {steps['asr']} steps of 30 s of speech for recognition, {steps['st']} for "
        f"translation, the same settings for all arms, seeds {', '.join(map(str, seeds))}. Pre-training: "
        f"{steps['stage1']} steps of stage 1 or of speech alone, {steps['stage2']} more of stage 2, one seed, on "
        "training splits only. Intervals: 95%, bootstrap over utterances, each drawn with all its seeds; differences "
        "are paired.",
        "",
        "Effective rank: of the encoder's output on the test speech, before and after fine-tuning (mean over seeds).",
    ]
    before = study["rank_before_finetuning"]
    for title, table in study["tables"].items():
        metrics = [key for key in next(iter(table.values())) if key != "effective_rank"]
        heads = [cell for metric in metrics for cell in (metric.upper(), "of the seeds", "minus scratch")]
        lines += ["", f"## {_title(title)}", "", f"| start | {' | '.join(heads)} | rank before | after |"]
        lines.append("|" + "---|" * (len(heads) + 3))
        for arm, row in table.items():
            cells = []
            for metric in metrics:
                found = row[metric]
                cells += [str(Interval(**found["score"])), ", ".join(f"{score:.1f}" for score in found["seeds"])]
                difference = None if found["difference"] is None else Interval(**found["difference"])
                cells.append("" if difference is None else f"{difference}, {verdict(metric, difference)}")
            lines.append(f"| {arm} | {' | '.join(cells)} | {before[arm]:.1f} | {row['effective_rank']:.1f} |")
        number = next(iter(table.values()))[metrics[0]]["utterances"]
        lines += ["", f"{number} test utterances; WER and CER: lower is better, BLEU and chrF: higher."]
    lines += ["", "## Compute", "", "| run | minutes |", "|---|---|"]
    for name, note in study["commands"].items():
        lines.append(f"| {name} | {note['seconds'] / 60:.1f} |")
    total = sum(note["seconds"] for note in study["commands"].values()) / 3600
    there = study["environment"]
    lines += ["", f"{total:.2f} hours in all, on {there['device']}; commit {there['commit'][:12]}."]
    return "\n".join(lines) + "\n"


def _title(title: str) -> str:
    task, _, labels = title.partition(", ")
    shown = {"asr": "Spanish recognition (CTC)", "st": "Spanish and French speech to English text"}[task]
    return f"{shown}, {'40 labelled utterances' if labels.startswith('few') else 'all labels'}"
