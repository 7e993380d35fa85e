"""Results of finished ablations: scores, differences, held-out figures, compute; the files that hold them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations_settings import BASE, UNTRAINED  # these three beside this file
from steps import commits, seconds
from study_results import config_of, labelled, training_files

if TYPE_CHECKING:
    from ablations import Plan


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


def results(plan: Plan, data_root: Path) -> dict[str, Any]:
    """What the runs' own files say; ``ablations_page`` writes it out."""
    from nemo_slam.evaluation.comparison import compare_arms
    from nemo_slam.training.environment import environment

    notes = seconds(plan.steps(), plan.folder)
    transcripts = {
        arm: [plan.output("finetune", arm, seed, "transcripts.jsonl") for seed in plan.seeds] for arm in plan.arms
    }
    scores = compare_arms(transcripts, ("cer",), "text", BASE)
    train = config_of(plan.nemo("finetune", plan.arms[0], plan.seeds[0]))["data"]["train_ds"]
    return {
        "corpus": json.loads((data_root / "corpus.json").read_text())["speakers"],
        "settings": asdict(plan.settings),
        "seeds": plan.seeds,
        "labelled": labelled(train, "text"),
        "base": _base(plan),
        "variants": {arm: _variant(plan, arm, scores[arm]["cer"], notes) for arm in plan.arms},
        "environment": environment(),
        "commits": commits(plan.steps()),
        "seconds": notes,
    }


def _variant(plan: Plan, arm: str, score: Mapping[str, Any], notes: Mapping[str, float]) -> dict[str, Any]:
    trained, number = arm != UNTRAINED, len(plan.seeds)
    figures = [held_out(plan.output("pretrain", arm, seed, "metrics.csv")) for seed in plan.seeds if trained]
    own = {step.name for seed in plan.seeds for step in plan.judging(arm, seed)}
    return {
        "title": plan.settings.variants[arm].title if trained else "no pre-training: the encoder as it was drawn",
        **score,
        "held_out": {
            figure.title: [found[figure.title] for found in figures]
            for figure in FIGURES
            if figures and all(figure.title in found for found in figures)
        },
        "minutes": {
            "pre-training": sum(notes[plan.nemo("pretrain", arm, seed).stem] for seed in plan.seeds if trained)
            / (60 * number),
            "fine-tuning": sum(notes[name] for name in own) / (60 * number),
        },
    }


def _base(plan: Plan) -> dict[str, Any] | None:
    """What the base run trained on and for, by its own config."""
    if BASE not in plan.arms:
        return None
    config = config_of(plan.nemo("pretrain", BASE, plan.seeds[0]))
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


def write(found: Mapping[str, Any], numbers: Path, text: Path) -> None:
    """``ablations.json``, and ``ablations.md`` with its pictures in ``images``, in these folders."""
    from ablations_page import page, pictures  # beside this file

    content = {
        numbers / "ablations.json": json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n",
        **{text / "images" / name: picture for name, picture in pictures(found).items()},
        text / "ablations.md": page(found).encode(),
    }
    for path, data in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"ablations: {path}")
