"""What is kept of a finished arm and seed, small enough for the repository: what takes hours may go on elsewhere, and
the page can be made anew, without the run folders."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ablations_settings import UNTRAINED  # these three beside this file
from steps import seconds
from study_results import config_of, labelled, training_files

from nemo_slam.evaluation.comparison import pooled
from nemo_slam.evaluation.text_metrics import Counts, count

if TYPE_CHECKING:
    from ablations import Plan

METRIC, REFERENCE = "cer", "text"


@dataclass(frozen=True)
class Figure:
    """A held-out figure of pre-training: a column of metrics.csv, perhaps less another one, times a scale."""

    title: str
    column: str
    less: str | None = None
    scale: float = 1.0

    def of(self, row: Mapping[str, str]) -> float | None:
        """None where the run has no such figure."""
        found = [row.get(name) for name in (self.column, self.less) if name is not None]
        if not all(found):
            return None
        values = [float(value) for value in found if value]
        return self.scale * (values[0] - sum(values[1:]))


FIGURES = (
    Figure("codes: information gain, nat", "val_masked_speech/code_information_gain"),
    Figure("codes: perplexity", "val_masked_speech/code_perplexity"),
    Figure(
        *("contrastive margin, points", "val_probe/contrastive_accuracy"),
        *("val_probe/contrastive_accuracy_other_context", 100),
    ),
    Figure("masked text, % right", "val_masked_text/token_accuracy", scale=100),
    Figure("TLM text, % right", "val_translation_lm/token_accuracy", scale=100),
    Figure("matching, % right", "val_matching/accuracy", scale=100),
    Figure("CTC loss, nat a character", "val_ctc"),
)


def held_out(metrics: Path) -> dict[str, float]:
    """The figures of a run's last validation.

    Raises:
        ValueError: the run was never validated.
    """
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_loss")]
    if not rows:
        raise ValueError(
            f"{metrics} has no row with val_loss: the run was never validated, or ended in its only validation. Delete "
            f"{metrics.parent}; the same command trains it again"
        )
    values = {figure.title: figure.of(rows[-1]) for figure in FIGURES}
    return {title: value for title, value in values.items() if value is not None}


def settings_of(plan: Plan, arm: str) -> dict[str, Any]:
    """What the results of an arm depend on, beside its seed and the code."""
    common = {key: value for key, value in asdict(plan.settings).items() if key not in ("seeds", "variants")}
    variant = None if arm == UNTRAINED else plan.settings.variants[arm]
    own = {} if variant is None else {"variant_keys": variant.keys, "norm": variant.norm}
    return json.loads(json.dumps(common | own))


def read_record(plan: Plan, arm: str, seed: int) -> dict[str, Any] | None:
    """The record of a finished arm and seed, or None. Exits where it was made with other settings."""
    file = plan.record(arm, seed)
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if found["settings"] != settings_of(plan, arm):
        sys.exit(f"ablations: {file} is of other settings than ablations_settings.py. Delete it to have it made again")
    return found


def write_record(plan: Plan, arm: str, seed: int, data_root: Path) -> None:
    """From the files that its runs left."""
    steps = plan.steps_of(arm, seed)
    config = config_of(plan.nemo("finetune", arm, seed))
    (counts,) = pooled([plan.output("finetune", arm, seed, "transcripts.jsonl")], METRIC, REFERENCE)
    errors, characters = counts.per_utterance.astype(int).T.tolist()
    made = json.loads(plan.output("finetune", arm, seed, "environment.json").read_text())
    content = {
        "settings": settings_of(plan, arm),
        "seed": seed,
        **{key: made[key] for key in ("commit", "torch", "nemo_toolkit", "CPU")},
        "seconds": seconds(steps, plan.folder),
        "speakers": json.loads((data_root / "corpus.json").read_text())["speakers"],
        "labelled": labelled(config["data"]["train_ds"], REFERENCE),
        "trained_on": None if arm == UNTRAINED else _trained_on(config_of(plan.nemo("pretrain", arm, seed))),
        "held_out": {} if arm == UNTRAINED else held_out(plan.output("pretrain", arm, seed, "metrics.csv")),
        "errors": errors,
        "characters": characters,
    }
    file = plan.record(arm, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in content.items()) + "\n}\n")
    os.replace(part, file)


def counts_of(record: Mapping[str, Any]) -> Counts:
    """Errors and characters of its test utterances."""
    table = np.array([record["errors"], record["characters"]], np.float64).T
    return replace(count(METRIC, [], []), per_utterance=table)


def _trained_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run trained on and for, by its own config."""
    objectives, streams = config["model"]["objectives"], config["data"]["train_ds"]
    return {
        "weights": {name: node["weight"] for name, node in objectives.items() if node is not None},
        "seconds_per_step": {kind: streams[kind]["frames_per_step"] / 100 for kind in ("speech", "pairs")},
        "tokens_per_step": streams["text"]["tokens_per_step"],
        "hours": {kind: _hours(streams[kind]["manifest_filepath"]) for kind in ("speech", "pairs")},
        "pairs": training_files(streams["pairs"]),
    }


def _hours(manifests: str | list[str]) -> float:
    """Of the manifests' rows."""
    paths = [manifests] if isinstance(manifests, str) else manifests
    lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return sum(json.loads(line)["duration"] for line in lines) / 3600
