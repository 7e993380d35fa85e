"""What a run folder says about itself: figures by step, config, rows left out; nothing here loads a model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_slam.config import flattened
from nemo_slam.training.environment import FILE_NAME as ENVIRONMENT_FILE


@dataclass(frozen=True)
class Series:
    """One column of ``metrics.csv``: the steps that have a value, and the values. A value may be NaN."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def tail(self, share: float) -> tuple[float, ...]:
        """The values of the last ``share`` of the steps that have one; at least one value."""
        return self.values[-max(1, round(len(self.values) * share)) :]

    def head(self, share: float) -> tuple[float, ...]:
        return self.values[: max(1, round(len(self.values) * share))]


@dataclass
class Run:
    """A run folder, read.

    Attributes:
        label: its name in the report; unique there.
        training, validation: columns of ``metrics.csv``, the latter without ``val_``.
        config: ``config.yaml``, or empty.
        skipped: lines of ``skipped_steps.jsonl``.
        bad_rows: how many lines ``bad_rows.jsonl`` has.
        environment: what the run recorded when it started, or None.
    """

    folder: Path
    label: str
    training: dict[str, Series]
    validation: dict[str, Series]
    config: dict[str, Any]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    bad_rows: int = 0
    environment: dict[str, str] | None = None

    @property
    def last_step(self) -> int:
        return max((series.steps[-1] for series in [*self.training.values(), *self.validation.values()]), default=0)

    @property
    def max_steps(self) -> int | None:
        return (self.config.get("trainer") or {}).get("max_steps")

    @property
    def is_pretraining(self) -> bool:
        return "objectives" in (self.config.get("model") or {})

    def figure(self, name: str) -> Series | None:
        """A column's validation values, or its training values where validation has none."""
        return self.validation.get(name) or self.training.get(name)

    def setting(self, path: str) -> Any:
        """A config key by its dotted path; None where a part of the path is missing."""
        node: Any = self.config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read a run folder, of pre-training or fine-tuning.

    Raises:
        FileNotFoundError: no ``metrics.csv`` there.
    """
    metrics = folder / "metrics.csv"
    if not metrics.is_file():
        raise FileNotFoundError(
            f"{folder}: no metrics.csv, so it is not a run folder that has trained. A run folder is "
            "exp_manager.exp_dir/name of scripts/speech_pretrain.py or scripts/speech_finetune.py"
        )
    training, validation = read_metrics(metrics)
    config = folder / "config.yaml"
    loaded = OmegaConf.to_container(OmegaConf.load(config), resolve=False) if config.is_file() else {}
    environment = folder / ENVIRONMENT_FILE
    return Run(
        folder,
        label or folder.resolve().name,
        training,
        validation,
        loaded if isinstance(loaded, dict) else {},  # type: ignore[arg-type]
        [json.loads(line) for line in _lines(folder / "skipped_steps.jsonl")],
        len(_lines(folder / "bad_rows.jsonl")),
        json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else None,
    )


def _lines(path: Path) -> list[str]:
    """Lines of a JSON-lines file that may not exist; a last one that a kill cut short is left out."""
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(path: Path) -> tuple[dict[str, Series], dict[str, Series]]:
    """Columns of a ``metrics.csv``: of training, and of validation without the prefix ``val_``.

    Raises:
        ValueError: a step or value that is no number, with its line.
    """
    columns: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or []):
            raise ValueError(f"{path}: no column 'step'; it has {', '.join(reader.fieldnames or [])}")
        for row in reader:
            if None in row.values():
                continue  # the last line of a run that was killed while it wrote, or is writing now
            for name, value in row.items():
                if name != "step" and value:
                    try:
                        columns.setdefault(name, []).append((int(row["step"]), float(value)))
                    except ValueError:
                        raise ValueError(f"{path}, line {reader.line_num}: {name} is {value!r}, not a number") from None
    series = {name: Series(*map(tuple, zip(*points, strict=True))) for name, points in columns.items()}
    training = {name: values for name, values in series.items() if not name.startswith("val_")}
    validation = {name.removeprefix("val_"): values for name, values in series.items() if name.startswith("val_")}
    return training, validation


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read several; those of one name are told apart by their parents."""
    paths = list(folders)
    names = [path.resolve().name for path in paths]
    labels = [
        "/".join(path.resolve().parts[-2:]) if names.count(name) > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    return [read_run(path, label) for path, label in zip(paths, labels, strict=True)]


MISSING = object()


def config_differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(key, value of each run) wherever configs differ. A copy that the config keeps of ``data`` is shown once."""
    flat = [flattened(run.config) for run in runs]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    copies = ("model.train_ds.", "model.validation_ds.", "model.tokenizer.model_path", "model.seed")
    differences = []
    for key in keys:
        if key.startswith(copies):
            continue
        values = [leaves.get(key, MISSING) for leaves in flat]
        if any(value != values[0] for value in values):
            differences.append((key, ["(no such key)" if value is MISSING else _text(value) for value in values]))
    return differences


def _text(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, bool | list | dict) else str(value)
