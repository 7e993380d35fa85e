"""Does pre-training learn? Experiments on a CPU, several seeds each, compared with thresholds.

    python benchmarks/learning.py oracle     # across modalities: an artificial language of 16 words
    python benchmarks/learning.py stage1     # from speech and from text: human telephone prompts (data/prompts)
    python benchmarks/learning.py collapse --seeds 0  # what the contrastive loss is for: without it, codes collapse,
    python benchmarks/learning.py noise --seeds 0     # or, if a diversity loss keeps them apart, mean nothing

Each seed is a run of scripts/speech_pretrain.py with its own folder; the same command again goes on where it stopped.
Writes benchmarks/results/learning_<experiment>.json and exits with 1 if a threshold is missed.
"""

from __future__ import annotations

import argparse
import json
import operator
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_slam.training.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Threshold:
    """A figure that every seed must reach, or (``scope`` best) the best of them."""

    figure: str
    bound: float
    at_least: bool = True
    scope: str = "every"

    def met(self, values: list[float]) -> bool:
        compare = operator.ge if self.at_least else operator.le
        return (any if self.scope == "best" else all)(compare(value, self.bound) for value in values)

    def __str__(self) -> str:
        return f"{self.scope} seed: {self.figure} {'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Experiment:
    """What is run, on which held-out data it is looked at, and what must come out."""

    arguments: tuple[str, ...]
    steps: int
    label: str
    thresholds: tuple[Threshold, ...]


# Measured before tiny lost its positions of speech.
STAGE1 = ("--config-name", "slam_stage1", "model=tiny", "model.multimodal_encoder.speech_positions=sinusoidal")
HUMAN = "real: human telephone prompts, public-domain text"
EXPERIMENTS = {
    "oracle": Experiment(
        ("--config-name", "oracle_language"),
        3000,
        "synthetic: chords for words",
        (
            Threshold("matching_accuracy_nearest", 0.90),
            Threshold("matching_accuracy_rotated", 0.80),
            Threshold("text_given_speech", 0.50),
            Threshold("text_given_speech", 0.80, scope="best"),
            Threshold("text_given_other_speech", 0.10, at_least=False),
            Threshold("retrieval_at_1", 0.80),
        ),
    ),
    "stage1": Experiment(
        STAGE1,
        1200,
        HUMAN,
        (
            Threshold("train_information_gain", 0.12),
            Threshold("held_out_information_gain", 0.05),
            Threshold("contrastive_margin", 0.04),
            Threshold("code_perplexity", 12),
            Threshold("code_accuracy_margin", 0.03),
            Threshold("text_gain", 0.20),
        ),
    ),
    "collapse": Experiment(
        (*STAGE1, "model.speech_loss.contrastive_weight=0", "model.speech_loss.diversity_weight=0"),
        1200,
        HUMAN,
        (
            Threshold("code_perplexity", 12, at_least=False),
            Threshold("held_out_information_gain", 0.05, at_least=False),
        ),
    ),
    "noise": Experiment(
        (*STAGE1, "model.speech_loss.contrastive_weight=0", "model.speech_loss.diversity_weight=0.1"),
        1200,
        HUMAN,
        (Threshold("code_perplexity", 40), Threshold("held_out_information_gain", 0.05, at_least=False)),
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--steps", type=int, help="default: the experiment's")
    parser.add_argument("--exp-dir", type=Path, default=Path("runs/learning"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/learning_EXPERIMENT.json")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for scripts/speech_pretrain.py")
    return parser.parse_intermixed_args()


def train(experiment: Experiment, name: str, seed: int, options: argparse.Namespace) -> Path:
    """One run to its end, or nothing if it is finished. Returns its run folder.

    Exits where the folder was begun with other settings, whose figures would pass for those of these.
    """
    folder = options.exp_dir / name
    arguments = [
        *experiment.arguments,
        f"name={name}",
        f"seed={seed}",
        f"exp_manager.exp_dir={options.exp_dir}",
        f"trainer.max_steps={options.steps or experiment.steps}",
        *options.overrides,
    ]
    note = folder / "arguments.json"
    if note.is_file() and json.loads(note.read_text()) != arguments:
        sys.exit(f"learning: {folder} was begun with other settings: give another --exp-dir, or delete it")
    if not (folder / f"{name}.nemo").exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(arguments))
        print("$ python scripts/speech_pretrain.py", *arguments, flush=True)
        subprocess.run([sys.executable, str(ROOT / "scripts/speech_pretrain.py"), *arguments], check=True)
    return folder


def oracle_figures(folder: Path) -> dict[str, float]:
    """Accuracies on the test sequences, which share no text with the others."""
    import torch

    from nemo_slam.data.loader import ValidationDataset, build_streams
    from nemo_slam.evaluation.probes import probe
    from nemo_slam.objectives.base import ObjectiveOutput
    from nemo_slam.objectives.metrics import MetricAccumulator

    model, cfg = restore(folder)
    figures: dict[str, float] = {}
    for negatives in ("nearest", "rotated"):
        node = {**cfg["data"]["validation_ds"]["pairs"], "negatives": negatives}
        node["manifest_filepath"] = node["manifest_filepath"].replace("_dev", "_test")
        streams = build_streams({"pairs": node}, seed=0, tokenizer=cfg["data"]["tokenizer"]["model_path"], split="test")
        accumulator = MetricAccumulator()
        dataset = ValidationDataset(streams)
        for batch in (dataset[number] for number in range(len(dataset))):
            with torch.no_grad():
                accumulator.update(model.objectives["matching"](model(batch)), {})
                accumulator.update(probe(model, batch) if negatives == "nearest" else ObjectiveOutput(), {})
        result = accumulator.flush()
        figures[f"matching_accuracy_{negatives}"] = result["matching/accuracy"]
        figures |= {name.removeprefix("probe/"): value for name, value in result.items() if name.startswith("probe/")}
    return figures


def stage1_figures(folder: Path) -> dict[str, float]:
    """The last five training intervals' mean and the last validation's figures, from metrics.csv.

    Gains in nat, margins as shares. contrastive_margin: over the accuracy with another utterance's context;
    code_accuracy_margin: over always saying the commonest code; text_gain: masked tokens' cross entropy below that of
    the training text's unigram.

    Exits where the run was ended in its last validation: the figures of the one before would pass for those of its end.
    """
    import pandas
    import yaml

    rows = pandas.read_csv(folder / "metrics.csv")
    trainer = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]
    batches = trainer["max_steps"] * trainer["accumulate_grad_batches"]
    last = (batches - batches % trainer["val_check_interval"]) // trainer["accumulate_grad_batches"]
    validated = rows[rows["val_loss"].notna() & (rows["step"] == last)] if "val_loss" in rows else rows[:0]
    if validated.empty:
        sys.exit(
            f"learning: {folder / 'metrics.csv'} has no validation of step {last}, where the last one is due: the run "
            "was ended before it. Delete the folder; the same command trains it again"
        )
    train = rows.dropna(subset=["loss"]).tail(5).mean()
    held_out = validated.iloc[-1]
    speech = "masked_speech"
    figures = {
        "train_information_gain": train[f"{speech}/code_information_gain"],
        "held_out_information_gain": held_out[f"val_{speech}/code_information_gain"],
        "code_perplexity": held_out[f"val_{speech}/code_perplexity"],
        "code_accuracy_margin": held_out[f"val_{speech}/code_accuracy"] - held_out[f"val_{speech}/code_top_share"],
        "text_gain": held_out["val_masked_text/tokens_by_unigram"] - held_out["val_masked_text/tokens"],
    }
    if "val_probe/contrastive_accuracy" in held_out:  # not of a run without the loss
        other = held_out["val_probe/contrastive_accuracy_other_context"]
        figures["contrastive_margin"] = held_out["val_probe/contrastive_accuracy"] - other
    return figures


def training_seconds(folder: Path) -> float:
    """Wall time of the training steps, from metrics.csv; includes what else ran on the machine."""
    import pandas

    return round(float(pandas.read_csv(folder / "metrics.csv")["seconds"].sum()), 1)


def commit(folder: Path) -> str | None:
    """The commit that trained a run (with a + where there were changes), if the run noted it."""
    file = folder / "environment.json"
    return json.loads(file.read_text())["commit"] if file.exists() else None


def restore(folder: Path) -> tuple[Any, dict]:
    """The trained model, ready to evaluate, and the run's config."""
    from omegaconf import OmegaConf

    from nemo_slam.models.pretraining import SLAMPretrainingModel

    model = SLAMPretrainingModel.restore_from(str(folder / f"{folder.name}.nemo"), map_location="cpu").eval()
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict)
    return model, config


def main() -> int:
    options = parse_arguments()
    experiment = EXPERIMENTS[options.experiment]
    seeds = []
    for seed in options.seeds:
        folder = train(experiment, f"{options.experiment}_{seed}", seed, options)
        measured = oracle_figures(folder) if options.experiment == "oracle" else stage1_figures(folder)
        figures = {name: float(value) for name, value in measured.items()}
        seeds.append({"seed": seed, "training_seconds": training_seconds(folder), "commit": commit(folder), **figures})
        print(f"seed {seed}:", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)
    checks = []
    for threshold in experiment.thresholds:
        values = [row[threshold.figure] for row in seeds]
        checks.append({"threshold": str(threshold), "values": values, "met": threshold.met(values)})
        print("met   " if checks[-1]["met"] else "MISSED", threshold, [f"{value:.3f}" for value in values])
    out = options.out or RESULTS / f"learning_{options.experiment}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "experiment": options.experiment,
        "data": experiment.label,
        "steps": options.steps or experiment.steps,
        "overrides": options.overrides,
        "seeds": seeds,
        "checks": checks,
        "environment": environment(),
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print("result file:", out)
    return 0 if all(check["met"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
