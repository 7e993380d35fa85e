"""Results of a study's finished runs: scores, differences, ranks, compute; and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from steps import commits, seconds
from study_settings import BASELINE

if TYPE_CHECKING:
    from study import Plan


def results(plan: Plan, data_root: Path) -> dict[str, Any]:
    """What the runs' own files say; ``nemo_slam.evaluation.results_page`` writes it out."""
    from nemo_slam.training.environment import environment

    notes = seconds_of(plan)
    tables = [
        table(plan, name, labels, notes)
        for name, task in plan.tasks.items()
        for labels in task.labels
        if plan.arms[name]
    ]
    pretrained = {arm: config_of(plan.nemo(arm)) for arms in plan.arms.values() for arm in arms if arm != BASELINE}
    return {
        "corpus": json.loads((data_root / "corpus.json").read_text())["speakers"],
        "longest_test": plan.study.longest_test,
        "settings": asdict(plan.study),
        "seeds": plan.seeds,
        "history": plan.study.history,
        "arms": {
            arm: {
                "chain": [[name, plan.study.arms[name].steps] for name in plan.chain(arm)],
                "minutes": sum(notes[f"pretrain {name}"] for name in plan.chain(arm)) / 60,
                "files": training_files(config["data"]["train_ds"]),
            }
            for arm, config in pretrained.items()
        },
        "tables": tables,
        "environment": environment(),
        "commits": commits([*plan.preparation(), *plan.comparison()]),
        "seconds": notes,
    }


def table(plan: Plan, name: str, labels: str, notes: Mapping[str, float]) -> dict[str, Any]:
    """One task with one set of labels: a row an arm."""
    from nemo_slam.evaluation.comparison import compare_arms
    from nemo_slam.evaluation.transcription import restore

    task = plan.tasks[name]
    runs = {arm: plan.runs(name, arm, labels) for arm in plan.arms[name]}
    files = {arm: [plan.folder / run / "test.jsonl" for run in own] for arm, own in runs.items()}
    rows = compare_arms(files, task.metrics, task.reference, BASELINE)
    for arm, own in runs.items():
        ranks = [_rank(plan.folder / run / "probes.json") for run in own]
        rows[arm]["rank_before"] = _rank(plan.rank_before(name, arm))
        rows[arm]["rank_after"] = sum(ranks) / len(ranks)
        rows[arm]["choice"] = plan.choice(name, arm, labels)
        rows[arm]["trials"] = plan.trial_scores(name, arm, labels) if len(task.choices_of(arm)) > 1 else {}
        rows[arm]["minutes"] = sum(notes[run] for run in own) / len(own) / 60
    first = plan.nemo(runs[plan.arms[name][0]][0])
    train = config_of(first)["data"]["train_ds"]
    return {
        "task": name,
        "title": task.title,
        "labels": labels,
        "labelled": labelled(train, task.reference),
        "steps": task.steps,
        "seconds_per_step": train["frames_per_step"] / 100,
        "parameters": sum(p.numel() for p in restore(first).parameters()),
        "metrics": list(task.metrics),
        "choices": {arm: task.choices_of(arm) for arm in runs},
        "arms": rows,
    }


def _rank(probes: Path) -> float:
    return json.loads(probes.read_text())["effective_rank"]


def config_of(nemo: Path) -> dict[str, Any]:
    """The resolved config that a run leaves beside its model."""
    return yaml.safe_load((nemo.parent / "config.yaml").read_text())


def labelled(train: Mapping[str, Any], reference: str) -> int:
    """Rows of a run's training manifests that have a reference."""
    paths = train["manifest_filepath"]
    paths = [paths] if isinstance(paths, str) else paths
    lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return sum(reference in json.loads(line) for line in lines if line.strip())


def training_files(node: Any) -> list[str]:
    """The names of the files that a run's training streams read."""
    if isinstance(node, list):
        return sorted({name for value in node for name in training_files(value)})
    if isinstance(node, Mapping):
        paths = [value for key, value in node.items() if key in ("manifest_filepath", "text_filepath") and value]
        paths = [path for value in paths for path in ([value] if isinstance(value, str) else value)]
        return sorted({Path(path).name for path in paths} | set(training_files([*node.values()])))
    return []


def seconds_of(plan: Plan) -> dict[str, float]:
    """What each command took, over all attempts."""
    return seconds([*plan.preparation(), *plan.comparison()], plan.folder)


def write(found: Mapping[str, Any], numbers: Path, text: Path) -> None:
    """The study's numbers and its page in these folders."""
    from nemo_slam.evaluation.results_page import page

    for folder, name, content in (
        (numbers, "results.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n"),
        (text, "results.md", page(found)),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
        print(f"study: {folder / name}")
