"""The page that the study's numbers become, docs/results.md. Every statement follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_slam.evaluation.comparison import RESAMPLES, verdict
from nemo_slam.evaluation.text_metrics import LOWER_IS_BETTER, Interval


def page(study: Mapping[str, Any]) -> str:
    """The page of ``benchmarks/study.py``'s results."""
    tables = study["tables"]
    seeds = study["seeds"]
    lines = [
        "# Results: does pre-training help?",
        "",
        "Made by `make study`; the numbers are in `benchmarks/results/results.json`.",
        "",
        *(line for table in tables for line in _summary(table)),
        "",
        f"**Speakers: {study['corpus']}.** Those who read the training data read the test utterances (up to "
        f"{study['longest_test']:g} s) too. These figures compare ways to start; they do not say how well anything "
        "recognises or translates speech.",
        "",
        "Fine-tuning has the same steps for all arms; pre-training comes on top, and scratch was not given its time. "
        "Where a table names settings each arm chooses among as many, "
        f"on the dev utterances with the first seed. {study['history']} {len(seeds)} seed(s) "
        f"({', '.join(map(str, seeds))}). **Each arm was pre-trained once**, and its fine-tuning seeds share that "
        "encoder: nothing here says how far another pre-training would have come. Intervals: 95%, by "
        f"{RESAMPLES} bootstrap resamples of the utterances, each drawn with all its seeds; differences are paired.",
        "",
        "Effective rank: of the encoder's output on the task's test speech, before fine-tuning and after (mean over "
        "seeds).",
        *(line for table in tables for line in _table(table)),
        *_compute(study),
    ]
    return "\n".join(lines) + "\n"


def _title(table: Mapping[str, Any]) -> str:
    return f"{table['title']}, {table['labels']} labels ({table['labelled']} utterances)"


def _differences(table: Mapping[str, Any], metric: str) -> dict[str, Interval]:
    found = {arm: row[metric]["difference"] for arm, row in table["arms"].items()}
    return {arm: Interval(**difference) for arm, difference in found.items() if difference is not None}


def _summary(table: Mapping[str, Any]) -> list[str]:
    """A line on the first metric: which arms are better than scratch, which worse."""
    metric = table["metrics"][0]
    groups: dict[str, list[str]] = {"better": [], "worse": [], "not clear of zero": []}
    for arm, difference in _differences(table, metric).items():
        groups[verdict(metric, difference)].append(f"{arm} ({difference.value:+.1f})")
    said = "; ".join(f"{how}: {', '.join(arms)}" for how, arms in groups.items() if arms)
    return [f"* {_title(table)}, {_name(metric)} minus scratch: {said}."] if said else []


def _name(metric: str) -> str:
    return {"chrf": "chrF"}.get(metric, metric.upper())


def _table(table: Mapping[str, Any]) -> list[str]:
    metrics = table["metrics"]
    heads = [cell for metric in metrics for cell in (_name(metric), "of the seeds", "minus scratch")]
    lines = ["", f"## {_title(table)}", "", f"| start | {' | '.join(heads)} | rank before | after |"]
    lines.append("|" + "---|" * (len(heads) + 3))
    for arm, row in table["arms"].items():
        cells = []
        for metric in metrics:
            found, difference = row[metric], _differences(table, metric).get(arm)
            cells += [str(Interval(**found["score"])), ", ".join(f"{score:.1f}" for score in found["seeds"])]
            cells.append("" if difference is None else f"{difference}, {verdict(metric, difference)}")
        lines.append(f"| {arm} | {' | '.join(cells)} | {row['rank_before']:.1f} | {row['rank_after']:.1f} |")
    number = next(iter(table["arms"].values()))[metrics[0]]["utterances"]
    better = "; ".join(f"{_name(m)}: {'lower' if m in LOWER_IS_BETTER else 'higher'} is better" for m in metrics)
    lines += [
        "",
        f"{table['parameters'] / 1e6:.2f} M parameters, {table['steps']} steps of {table['seconds_per_step']:g} s of "
        f"speech; {number} test utterances. {better}.",
    ]
    return lines + _trials(table)


def _trials(table: Mapping[str, Any]) -> list[str]:
    """What each arm tried, and kept."""
    tried = {arm: row["trials"] for arm, row in table["arms"].items() if row["trials"]}
    if not tried:
        return []
    scores = {arm: ", ".join(f"{name} {score:.1f}" for name, score in found.items()) for arm, found in tried.items()}
    said = "; ".join(f"{arm}: {found}, kept {table['arms'][arm]['choice']}" for arm, found in scores.items())
    keys = {name: " ".join(keys) for choices in table["choices"].values() for name, keys in choices.items()}
    means = ", ".join(f"{name} `{value}`" for name, value in keys.items() if value)
    return [
        "",
        f"Settings tried, {_name(table['metrics'][0])} of the dev utterances: {said}. The first seed's run with what "
        f"was kept is one of those compared. What they mean: {means}.",
    ]


def _compute(study: Mapping[str, Any]) -> list[str]:
    """What was spent, by arm, and in all."""
    tables = study["tables"]
    heads = [f"{table['task']}, {table['labels']}" for table in tables]
    lines = ["", "## Compute, in minutes", "", f"| start | pre-training, steps | minutes | {' | '.join(heads)} |"]
    lines.append("|" + "---|" * (len(heads) + 3))
    for arm in dict.fromkeys(arm for table in tables for arm in table["arms"]):
        made = study["arms"].get(arm, {"chain": [], "minutes": 0.0})
        chain = ", then ".join(f"{name} {steps}" for name, steps in made["chain"]) or "none"
        rows = [table["arms"].get(arm) for table in tables]
        cells = ["" if row is None else f"{row['minutes']:.1f}" for row in rows]
        lines.append(f"| {arm} | {chain} | {made['minutes']:.1f} | {' | '.join(cells)} |")
    files = sorted({name for made in study["arms"].values() for name in made["files"]})
    made = ", ".join(commit[:13] for commit in study["commits"])
    total, there = sum(study["seconds"].values()) / 3600, study["environment"]
    read = [f"Pre-training read {', '.join(files)}."] if files else []
    spent = f"A run of fine-tuning, mean over seeds. {total:.2f} hours in all, transcription and probes included"
    return [*lines, "", " ".join([*read, f"{spent}; on {there['CPU']}. The runs are of commit {made}."])]
