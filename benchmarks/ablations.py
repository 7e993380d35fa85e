"""What does each part of pre-training do? One thing changed at a time, on human speech, three seeds each.

    python benchmarks/ablations.py                                       # everything: hours on one core
    python benchmarks/ablations.py --variants base no_ctc --seeds 0      # a part; more later, the rest is kept
    python benchmarks/ablations.py --quick --folder /tmp/ablations       # two steps a run: whether it works

Each variant is pre-trained from scratch in one stage, then fine-tuned to recognise Spanish in few steps. Every run is a
command of this project with its own run folder; calling again goes on where it stopped, and several calls may share a
folder. Of each arm and seed that is done a record of a few kB is kept in benchmarks/results/ablations, and it is not
run again, with or without its folder. The whole writes benchmarks/results/ablations.json, docs/ablations.md and its
pictures in docs/images, a part of it writes to --folder; --quick writes all to --folder. The settings stand in
ablations_settings.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ablations_settings import ABLATIONS, UNTRAINED  # these beside this file
from steps import ROOT, Step, run


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms, seeds = [*ABLATIONS.variants, UNTRAINED], list(ABLATIONS.seeds)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"), help="run folders; default: %(default)s")
    parser.add_argument("--data-root", type=Path, default=Path("data/prompts"), help="default: %(default)s")
    parser.add_argument("--variants", nargs="+", choices=arms, default=arms, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds, help=f"default: {seeds}")
    parser.add_argument("--quick", action="store_true", help="two steps a run")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    return parser.parse_args(arguments)


class Plan:
    """All commands of what the options name."""

    def __init__(self, options: argparse.Namespace):
        self.settings = ABLATIONS.quick() if options.quick else ABLATIONS
        self.folder: Path = options.folder
        self.records = self.folder / "records" if options.quick else ROOT / "benchmarks" / "results" / "ablations"
        self.arms = [arm for arm in (*self.settings.variants, UNTRAINED) if arm in options.variants]
        self.seeds: list[int] = options.seeds
        self.judged_on = [options.data_root / name for name in self.settings.judged_on]
        self.common = (f"data.root={options.data_root}", f"exp_manager.exp_dir={self.folder}")

    def nemo(self, kind: str, arm: str, seed: int) -> Path:
        """``kind``: pretrain or finetune."""
        name = f"{kind}_{arm}_{seed}"
        return self.folder / name / f"{name}.nemo"

    def output(self, kind: str, arm: str, seed: int, file: str) -> Path:
        return self.nemo(kind, arm, seed).parent / file

    def record(self, arm: str, seed: int) -> Path:
        return self.records / f"{arm}_{seed}.json"

    def wrapper(self, arm: str) -> tuple[str, ...]:
        norm = None if arm == UNTRAINED else self.settings.variants[arm].norm
        return () if norm is None else ("benchmarks/with_norm.py", norm)

    def pretraining(self, arm: str, seed: int) -> Step:
        settings, nemo = self.settings, self.nemo("pretrain", arm, seed)
        steps = (f"trainer.max_steps={settings.steps}", f"trainer.val_check_interval={settings.steps}")
        own = (*self.common, *settings.keys, *settings.variants[arm].keys, *steps, f"seed={seed}")
        arguments = ("--config-name", settings.config, f"name={nemo.stem}", *own)
        return Step(nemo.stem, "speech_pretrain.py", arguments, nemo, self.wrapper(arm))

    def judging(self, arm: str, seed: int) -> list[Step]:
        """Fine-tuning, and the transcripts of utterances that nothing was trained on."""
        settings, nemo, wrapper = self.settings, self.nemo("finetune", arm, seed), self.wrapper(arm)
        keys = [*self.common, *settings.task_keys, f"trainer.max_steps={settings.task_steps}", f"seed={seed}"]
        if arm != UNTRAINED:
            keys.append(f"init_from={self.nemo('pretrain', arm, seed)}")
        train = ("--config-name", settings.task, f"name={nemo.stem}", *keys)
        out = self.output("finetune", arm, seed, "transcripts.jsonl")
        given = (str(nemo), *map(str, self.judged_on), "--out", str(out))
        return [
            Step(nemo.stem, "speech_finetune.py", train, nemo, wrapper),
            Step(f"{nemo.stem}: transcripts", "transcribe.py", given, out, wrapper),
        ]

    def steps_of(self, arm: str, seed: int) -> list[Step]:
        return [*([] if arm == UNTRAINED else [self.pretraining(arm, seed)]), *self.judging(arm, seed)]

    def order(self) -> list[tuple[str, int]]:
        """Arms and seeds in an order whose every part is a fair one: seeds outermost."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def steps(self) -> list[Step]:
        return [step for arm, seed in self.order() for step in self.steps_of(arm, seed)]


def main() -> None:
    options = parse_arguments()
    sys.path.insert(0, str(ROOT))
    options.folder = options.folder.resolve()
    plan = Plan(options)
    if options.dry_run:
        print("\n".join(step.shown for step in plan.steps()))
        return
    if not (options.data_root / "corpus.json").is_file():
        sys.exit(f"ablations: {options.data_root} is no prepared corpus: run python scripts/prepare_data.py prompts")

    from ablations_records import read_record, write_record  # these two beside this file
    from ablations_results import results, write

    for number, (arm, seed) in enumerate(plan.order(), 1):
        done = read_record(plan, arm, seed) is not None
        print(f"[{number}/{len(plan.order())}] {arm}, seed {seed}{': done before' if done else ''}", flush=True)
        if not done:
            for step in plan.steps_of(arm, seed):
                run(step, options.folder)
            write_record(plan, arm, seed, options.data_root)
    records = {arm: [found for seed in plan.seeds if (found := read_record(plan, arm, seed))] for arm in plan.arms}
    whole = not options.quick and plan.arms == [*ABLATIONS.variants, UNTRAINED]
    whole = whole and set(options.seeds) >= set(ABLATIONS.seeds)
    folder = options.folder
    write(results(plan, records), *((ROOT / "benchmarks/results", ROOT / "docs") if whole else (folder, folder)))


if __name__ == "__main__":
    main()
