"""Does pre-training help? Fine-tuning from scratch, from speech alone, from stage 1 and from stage 2, on human speech.

    python benchmarks/study.py                                  # everything: hours on two cores
    python benchmarks/study.py --arms scratch stage2 --seeds 0  # a part; more later, the rest is kept
    python benchmarks/study.py --quick --folder /tmp/study      # two steps a run: whether it works, not what is true

Every run is a command of this project with its own run folder; calling again goes on where it stopped. Pre-training
sees training splits only, and all arms get the same fine-tuning steps with the same settings. The whole study writes
benchmarks/results/study.json and docs/results.md, a part of it or --quick writes to --folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("scratch", "speech", "stage1", "stage2")
TASKS = {"asr": ARMS, "st": ("scratch", "stage2")}
LABELS = {"asr": ("all", "few"), "st": ("all",)}
METRICS = {"asr": ("cer", "wer"), "st": ("bleu", "chrf")}
SEEDS = (0, 1, 2)
FEW = 40
LONGEST_TEST = 10.0
"""Seconds: the marks of stock NeMo that ours are held against were taken on test utterances up to this."""


@dataclass(frozen=True)
class Step:
    """One command. ``output`` is there when it is done; ``arguments`` follow the script's name."""

    name: str
    script: str
    arguments: tuple[str, ...]
    output: Path


@dataclass(frozen=True)
class Size:
    """Optimizer steps of each kind of run."""

    stage1: int = 1200
    stage2: int = 600
    asr: int = 600
    st: int = 600


QUICK = Size(2, 2, 2, 2)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="run folders; default: %(default)s")
    parser.add_argument("--data-root", type=Path, default=Path("data/prompts"), help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="of fine-tuning; default: 0 1 2")
    parser.add_argument("--quick", action="store_true", help="two steps a run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    return parser.parse_args(arguments)


def pretraining(folder: Path, data_root: Path, size: Size, arms: list[str]) -> list[Step]:
    """The runs that the arms start from; one seed, shared by all fine-tuning seeds."""
    common = ("model=tiny", f"data.root={data_root}", f"exp_manager.exp_dir={folder}")
    wanted = {
        "speech": ("slam_stage1", size.stage1, ("model.objectives.masked_text=null",)),
        "stage1": ("slam_stage1", size.stage1, ()),
        "stage2": ("slam_stage2", size.stage2, (f"init_from={folder}/stage1/stage1.nemo",)),
    }
    needed = [arm for arm in wanted if arm in arms or (arm == "stage1" and "stage2" in arms)]
    steps = []
    for name in needed:
        config, number, keys = wanted[name]
        own = ("--config-name", config, f"name={name}", *common, f"trainer.max_steps={number}", *keys)
        steps.append(Step(f"pretrain {name}", "speech_pretrain.py", own, folder / name / f"{name}.nemo"))
    return steps


def finetuning(folder: Path, data_root: Path, size: Size, task: str, arm: str, labels: str, seed: int) -> list[Step]:
    """Fine-tune, transcribe the test utterances, probe the encoder."""
    name = f"{task}_{labels}_{arm}_{seed}"
    config = {"asr": "asr_ctc", "st": "st"}[task]
    keys = [f"trainer.max_steps={getattr(size, task)}", f"seed={seed}"]
    if labels == "few":
        keys.append(f"data.train_ds.manifest_filepath={folder}/manifests/es_train_{FEW}.json")
    if arm != "scratch":
        keys.append(f"init_from={folder}/{arm}/{arm}.nemo")
    common = ("model=tiny", f"data.root={data_root}", f"exp_manager.exp_dir={folder}")
    nemo, test = folder / name / f"{name}.nemo", folder / "manifests" / f"{task}_test.json"
    out, probes = folder / name / "test.jsonl", folder / name / "probes.json"
    return [
        Step(name, "speech_finetune.py", ("--config-name", config, f"name={name}", *common, *keys), nemo),
        Step(f"{name}: test", "transcribe.py", (str(nemo), str(test), "--out", str(out)), out),
        Step(f"{name}: probes", "evaluate.py", (str(nemo), str(test), "--probes", "--out", str(probes)), probes),
    ]


def starts(folder: Path, data_root: Path, arms: list[str]) -> list[Step]:
    """The encoder's effective rank before fine-tuning; a run of one step at a rate of 0 has the random encoder."""
    still = ("model.optim.lr=0.0", "model.optim_param_groups.encoder.lr=0.0", "model.optim.sched.min_lr=0.0")
    common = ("model=tiny", f"data.root={data_root}", f"exp_manager.exp_dir={folder}", "data.validation_ds=null")
    random = folder / "random" / "random.nemo"
    keys = ("--config-name", "asr_ctc", "name=random", *common, "trainer.max_steps=1", *still)
    steps = [Step("random", "speech_finetune.py", keys, random)] if "scratch" in arms else []
    for arm in arms:
        nemo = random if arm == "scratch" else folder / arm / f"{arm}.nemo"
        out = folder / "probes" / f"{arm}.json"
        test = folder / "manifests" / "asr_test.json"
        arguments = (str(nemo), str(test), "--probes", "--out", str(out))
        steps.append(Step(f"{arm}: probes before fine-tuning", "evaluate.py", arguments, out))
    return steps


def plan(options: argparse.Namespace) -> list[Step]:
    """All commands, in an order in which each finds what it needs."""
    folder, root, size = options.folder, options.data_root, QUICK if options.quick else Size()
    arms = [arm for arm in ARMS if arm in options.arms]
    steps = [*pretraining(folder, root, size, arms), *starts(folder, root, arms)]
    for seed in options.seeds:  # seeds last in the order of results, first in that of running: a part is a fair part
        for task in options.tasks:
            for labels in LABELS[task]:
                for arm in (arm for arm in arms if arm in TASKS[task]):
                    steps += finetuning(folder, root, size, task, arm, labels, seed)
    return steps


def run(step: Step, state: Path) -> None:
    """Run a command unless it is done, and note what it took (over all attempts).

    Exits where the command fails, or its output is there but came of another command.
    """
    shown = shlex.join(["python", f"scripts/{step.script}", *step.arguments])
    file = state / f"{step.name.replace(': ', '-').replace(' ', '-')}.json"
    note: dict[str, Any] = {"command": shown, "seconds": 0.0, "done": False}
    if file.is_file():
        note = json.loads(file.read_text())
    if note["command"] != shown:
        sys.exit(f"study: {step.name} was begun with other settings:\n  {note['command']}\nGive another --folder")
    if note["done"] and step.output.is_file():
        return
    print(f"\n$ {shown}", flush=True)
    started = time.perf_counter()
    status = subprocess.run([sys.executable, str(ROOT / "scripts" / step.script), *step.arguments]).returncode
    note["seconds"] += time.perf_counter() - started
    note["done"] = status == 0 and step.output.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(note, indent=1) + "\n")
    if not note["done"]:
        sys.exit(f"study: {step.name} ended with status {status}; the same command again goes on from here")


def write_manifests(folder: Path, data_root: Path) -> None:
    """The test utterances of each task, and the few training ones: those whose hash is smallest."""
    source = data_root / "manifests"

    def rows(name: str) -> list[dict[str, Any]]:
        lines = (source / f"{name}.json").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return [{**row, "audio_filepath": os.path.abspath(source / row["audio_filepath"])} for row in found]

    def write(name: str, chosen: list[dict[str, Any]]) -> None:
        path = folder / "manifests" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8")

    short = [row for name in ("es_test", "fr_test") for row in rows(name) if row["duration"] <= LONGEST_TEST]
    write("asr_test", [row for row in short if row["lang"] == "es"])
    write("st_test", [row for row in short if "translation" in row])
    train = sorted(rows("es_train"), key=lambda row: hashlib.sha256(row["prompt_id"].encode()).hexdigest())
    write(f"es_train_{FEW}", train[:FEW])


def results(options: argparse.Namespace) -> dict[str, Any]:
    """Scores, differences and compute of what the options name."""
    from environment import describe  # beside this file

    from nemo_slam.evaluation.comparison import compare_arms

    folder: Path = options.folder
    found: dict[str, Any] = {}
    for task in options.tasks:
        reference = {"asr": "text", "st": "translation"}[task]
        for labels in LABELS[task]:
            runs = {
                arm: [folder / f"{task}_{labels}_{arm}_{seed}" for seed in options.seeds]
                for arm in ARMS
                if arm in options.arms and arm in TASKS[task]
            }
            transcripts = {arm: [run / "test.jsonl" for run in own] for arm, own in runs.items()}
            table = compare_arms(transcripts, METRICS[task], reference, baseline="scratch")
            for arm, own in runs.items():
                ranks = [json.loads((run / "probes.json").read_text())["effective_rank"] for run in own]
                table[arm]["effective_rank"] = sum(ranks) / len(ranks)
            found[f"{task}, {labels} labels"] = table
    notes = {file.stem: json.loads(file.read_text()) for file in sorted((folder / "state").glob("*.json"))}
    before = {arm: json.loads((folder / "probes" / f"{arm}.json").read_text()) for arm in ARMS if arm in options.arms}
    return {
        "seeds": options.seeds,
        "steps": vars(QUICK if options.quick else Size()),
        "environment": describe(),
        "rank_before_finetuning": {arm: probes["effective_rank"] for arm, probes in before.items()},
        "tables": found,
        "commands": notes,
    }


def main() -> None:
    options = parse_arguments()
    sys.path.insert(0, str(ROOT))
    options.folder = options.folder.resolve()
    steps = plan(options)
    if options.dry_run:
        for step in steps:
            print(shlex.join(["python", f"scripts/{step.script}", *step.arguments]))
        return
    corpus = ("prompts", "--root", str(options.data_root))
    if not (options.data_root / "corpus.json").is_file():
        run(Step("corpus", "prepare_data.py", corpus, options.data_root / "corpus.json"), options.folder / "state")
    write_manifests(options.folder, options.data_root)
    for number, step in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {step.name}", flush=True)
        run(step, options.folder / "state")

    from nemo_slam.evaluation.comparison import page

    found = results(options)
    whole = not options.quick and set(options.arms) == set(ARMS) and set(options.tasks) == set(TASKS)
    whole = whole and set(options.seeds) >= set(SEEDS)
    target = ROOT / "benchmarks" / "results" / "study.json" if whole else options.folder / "study.json"
    text = ROOT / "docs" / "results.md" if whole else options.folder / "results.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text.write_text(page(found), encoding="utf-8")
    print(f"\nstudy: {target}, {text}")


if __name__ == "__main__":
    main()
