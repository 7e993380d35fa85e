"""Does pre-training help? Fine-tuning from scratch and from several pre-trainings, on human speech, over several seeds.

    python benchmarks/study.py                                  # everything: hours on two cores
    python benchmarks/study.py --arms scratch stage2 --seeds 0  # a part; more later, the rest is kept
    python benchmarks/study.py --quick --folder /tmp/study      # two steps a run: whether it works, not what is true

Every run is a command of this project with its own run folder; calling again goes on where it stopped. Pre-training
sees training splits only. All arms get the same fine-tuning steps and choose among the same settings, on dev
utterances. The whole study writes benchmarks/results/results.json and docs/results.md, a part of it or --quick writes
to --folder. What it consists of, steps, arms and settings, stands in study_settings.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from steps import ROOT, Step, run  # these two beside this file
from study_settings import BASELINE, STUDY


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="run folders; default: %(default)s")
    parser.add_argument("--data-root", type=Path, default=Path("data/prompts"), help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="of fine-tuning; default: the study's")
    parser.add_argument("--quick", action="store_true", help="two steps a run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(arguments)
    known = {"arms": [BASELINE, *STUDY.arms], "tasks": list(STUDY.tasks), "seeds": list(STUDY.seeds)}
    for name, values in known.items():
        asked = getattr(options, name)
        if name != "seeds" and (unknown := set(asked or ()) - set(values)):
            parser.error(f"--{name}: {', '.join(sorted(unknown))}: expected some of {', '.join(values)}")
        setattr(options, name, asked or values)
    return options


class Plan:
    """All commands of what the options name."""

    def __init__(self, options: argparse.Namespace):
        self.study = STUDY.quick() if options.quick else STUDY
        self.folder: Path = options.folder
        self.tasks = {name: task for name, task in self.study.tasks.items() if name in options.tasks}
        self.arms = {
            name: [arm for arm in (BASELINE, *task.arms) if arm in options.arms] for name, task in self.tasks.items()
        }
        self.seeds: list[int] = options.seeds
        self.common = (*self.study.common, f"data.root={options.data_root}", f"exp_manager.exp_dir={self.folder}")

    def nemo(self, name: str) -> Path:
        return self.folder / name / f"{name}.nemo"

    def manifest(self, task: str, split: str) -> Path:
        """``test`` or ``dev`` utterances of a task, or the ``few`` that are labelled."""
        return self.folder / "manifests" / f"{task}_{split}.json"

    def run_name(self, task: str, labels: str, arm: str, seed: int, choice: str) -> str:
        return f"{task}_{labels}_{arm}_{seed}_{choice}"

    def chain(self, arm: str) -> list[str]:
        """The pre-trainings behind an arm, first to last."""
        if arm == BASELINE:
            return []
        after = self.study.arms[arm].after
        return [*([] if after is None else self.chain(after)), arm]

    def pretraining(self) -> list[Step]:
        """The runs that the arms start from; one each, shared by all fine-tuning seeds."""
        needed = dict.fromkeys(name for arms in self.arms.values() for arm in arms for name in self.chain(arm))
        steps = []
        for name in needed:
            arm = self.study.arms[name]
            start = () if arm.after is None else (f"init_from={self.nemo(arm.after)}",)
            own = ("--config-name", arm.config, f"name={name}", *self.common, f"trainer.max_steps={arm.steps}")
            steps.append(Step(f"pretrain {name}", "speech_pretrain.py", (*own, *arm.keys, *start), self.nemo(name)))
        return steps

    def starts(self) -> list[Step]:
        """The encoder's effective rank before fine-tuning, on each task's test speech; a run of one step at a rate of 0
        has the random encoder."""
        still = ("model.optim.lr=0.0", "model.optim_param_groups.encoder.lr=0.0", "model.optim.sched.min_lr=0.0")
        keys = ("--config-name", "asr_ctc", "name=random", *self.common, "data.validation_ds=null", *still)
        random = Step("random", "speech_finetune.py", (*keys, "trainer.max_steps=1"), self.nemo("random"))
        steps = [random] if any(BASELINE in arms for arms in self.arms.values()) else []
        for task, arms in self.arms.items():
            for arm in arms:
                nemo, out = self.nemo("random" if arm == BASELINE else arm), self.rank_before(task, arm)
                arguments = (str(nemo), str(self.manifest(task, "test")), "--probes", "--out", str(out))
                steps.append(Step(f"{arm}: probes before {task}", "evaluate.py", arguments, out))
        return steps

    def rank_before(self, task: str, arm: str) -> Path:
        return self.folder / "probes" / f"{task}_{arm}.json"

    def training(self, name: str, arm: str, labels: str, seed: int, choice: str) -> Step:
        """Fine-tune."""
        task, run = self.tasks[name], self.run_name(name, labels, arm, seed, choice)
        keys = [
            *self.common,
            f"trainer.max_steps={task.steps}",
            f"seed={seed}",
            *task.keys,
            *task.choices_of(arm)[choice],
        ]
        if labels == "few":
            keys.append(f"data.train_ds.manifest_filepath={self.manifest(name, 'few')}")
        if arm != BASELINE:
            keys.append(f"init_from={self.nemo(arm)}")
        return Step(run, "speech_finetune.py", ("--config-name", task.config, f"name={run}", *keys), self.nemo(run))

    def transcription(self, name: str, run: str, split: str) -> Step:
        out = self.folder / run / f"{split}.jsonl"
        arguments = (str(self.nemo(run)), str(self.manifest(name, split)), "--out", str(out))
        return Step(f"{run}: {split}", "transcribe.py", arguments, out)

    def trials(self, name: str, arm: str, labels: str) -> dict[str, tuple[Step, Step]]:
        """By choice: a run with the first seed and its transcripts of the dev utterances."""
        found = {}
        for choice in self.tasks[name].choices_of(arm):
            step = self.training(name, arm, labels, self.seeds[0], choice)
            found[choice] = (step, self.transcription(name, step.name, "dev"))
        return found

    def trial_scores(self, name: str, arm: str, labels: str) -> dict[str, float]:
        """By choice: the first metric on the dev utterances. Needs the trials' transcripts."""
        from nemo_slam.evaluation.comparison import pooled

        task = self.tasks[name]
        files = {choice: steps[1].output for choice, steps in self.trials(name, arm, labels).items()}
        return {choice: pooled([file], task.metrics[0], task.reference)[0].total() for choice, file in files.items()}

    def choice(self, name: str, arm: str, labels: str) -> str:
        """The settings that an arm keeps."""
        from nemo_slam.evaluation.text_metrics import LOWER_IS_BETTER

        task = self.tasks[name]
        if len(task.choices_of(arm)) == 1:
            return next(iter(task.choices_of(arm)))
        scores = self.trial_scores(name, arm, labels)
        return (min if task.metrics[0] in LOWER_IS_BETTER else max)(scores, key=scores.__getitem__)

    def runs(self, name: str, arm: str, labels: str) -> list[str]:
        """What an arm is judged by: a run a seed, with the settings that it keeps."""
        choice = self.choice(name, arm, labels)
        return [self.run_name(name, labels, arm, seed, choice) for seed in self.seeds]

    def finetuning(self, name: str, arm: str, labels: str, seed: int) -> list[Step]:
        """Fine-tune, transcribe the test utterances, probe the encoder."""
        train = self.training(name, arm, labels, seed, self.choice(name, arm, labels))
        nemo, test, probes = str(train.output), str(self.manifest(name, "test")), train.output.parent / "probes.json"
        return [
            train,
            self.transcription(name, train.name, "test"),
            Step(f"{train.name}: probes", "evaluate.py", (nemo, test, "--probes", "--out", str(probes)), probes),
        ]

    def cells(self) -> list[tuple[str, str, str]]:
        """Task, arm, labels."""
        return [(n, arm, labels) for n, task in self.tasks.items() for labels in task.labels for arm in self.arms[n]]

    def preparation(self) -> list[Step]:
        """Pre-training, and the trials where there is something to choose."""
        cells = [cell for cell in self.cells() if len(self.tasks[cell[0]].choices_of(cell[1])) > 1]
        trials = [step for cell in cells for pair in self.trials(*cell).values() for step in pair]
        return [*self.pretraining(), *self.starts(), *trials]

    def comparison(self) -> list[Step]:
        """In an order whose every part is a fair one, since seeds come outermost. Needs the trials' transcripts."""
        return [step for seed in self.seeds for cell in self.cells() for step in self.finetuning(*cell, seed)]


def write_manifests(plan: Plan, data_root: Path) -> None:
    """The test and dev utterances of each task, and the few training ones: those whose hash is smallest."""
    from nemo_slam.data.corpora.files import write_text

    source = data_root / "manifests"

    def rows(name: str, reference: str) -> list[dict[str, Any]]:
        lines = (source / f"{name}.json").read_text(encoding="utf-8").splitlines()
        found = [row for row in map(json.loads, lines) if reference in row]
        return [{**row, "audio_filepath": os.path.realpath(source / row["audio_filepath"])} for row in found]

    def write(path: Path, chosen: list[dict[str, Any]]) -> None:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        if path.is_file() and path.read_text(encoding="utf-8") == content:
            return  # a run may be reading it
        write_text(path, content)

    for name, task in plan.tasks.items():
        tests = [row for language in task.languages for row in rows(f"{language}_test", task.reference)]
        write(plan.manifest(name, "test"), [row for row in tests if row["duration"] <= plan.study.longest_test])
        dev = [row for language in task.languages for row in rows(f"{language}_dev", task.reference)]
        write(plan.manifest(name, "dev"), dev)
        if "few" in task.labels:
            train = rows(f"{task.languages[0]}_train", task.reference)
            train.sort(key=lambda row: hashlib.sha256(row["prompt_id"].encode()).hexdigest())
            write(plan.manifest(name, "few"), train[: plan.study.few])


def main() -> None:
    options = parse_arguments()
    sys.path.insert(0, str(ROOT))
    options.folder = options.folder.resolve()
    plan = Plan(options)
    if options.dry_run:
        print("\n".join(step.shown for step in plan.preparation()))
        print(f"and every arm's fine-tuning with the settings that it keeps, seeds {' '.join(map(str, plan.seeds))}")
        return
    corpus = Step("corpus", "prepare_data.py", ("prompts", "--root", str(options.data_root)), options.data_root)
    if not (options.data_root / "corpus.json").is_file():
        run(corpus, options.folder)
    write_manifests(plan, options.data_root)
    for title, part in (("preparation", plan.preparation), ("comparison", plan.comparison)):
        steps = part()
        for number, step in enumerate(steps, 1):
            print(f"[{title} {number}/{len(steps)}] {step.name}", flush=True)
            run(step, options.folder)

    from study_results import results, write  # beside this file

    everything = parse_arguments([])
    whole = not options.quick and (options.arms, options.tasks) == (everything.arms, everything.tasks)
    whole = whole and set(options.seeds) >= set(everything.seeds)
    places = (ROOT / "benchmarks" / "results", ROOT / "docs") if whole else (options.folder, options.folder)
    write(results(plan, options.data_root), *places)


if __name__ == "__main__":
    main()
