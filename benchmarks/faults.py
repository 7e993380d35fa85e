"""Hurts training runs and checks the promise: finished work is never lost, and what resumes is exact.

    python benchmarks/faults.py                             # 60 trials; interrupted, the same command goes on
    python benchmarks/faults.py --trials 5 --only kill_9
    python benchmarks/faults.py --seed 123 --trial 17       # repeats one

Each trial starts a very small run (16 steps, a checkpoint every 4) in a process of its own, hurts it at a place drawn
from (seed, trial), starts it again as a user would, and compares the end with an undisturbed run: weights bit for bit
and every row of metrics.csv. The seed is another one each time and is printed. A line a trial goes to --out; the table
comes last, and of all faults also as benchmarks/results/faults_<time>.json. The exit status is 1 if a promise was
broken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = (
    *("kill_9", "sigterm", "disk_full", "shared_memory_full", "corrupt_checkpoint"),
    *("corrupt_data", "vanishing_data", "nan_gradient", "hanging_worker", "lost_rank"),
)
NEED_MOUNTS = {"disk_full", "shared_memory_full"}


def summary(outcomes: list[Any]) -> list[dict[str, Any]]:
    """A row a fault."""
    found = []
    for fault in KINDS:
        own = [outcome for outcome in outcomes if outcome.fault == fault]
        if own:
            lost = [outcome.lost for outcome in own]
            found.append(
                {
                    "fault": fault,
                    "trials": len(own),
                    "steps_lost": sum(lost),
                    "steps_lost_most": max(lost),
                    "steps_lost_allowed": max(outcome.may_lose for outcome in own),
                    "wrong": sum(bool(outcome.wrong) for outcome in own),
                }
            )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/faults.md has it."""
    lines = [
        "| fault | trials | lost steps, most | that may be lost, most | wrong resumes |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['fault'].replace('_', ' ')} | {row['trials']} | {row['steps_lost_most']} | "
            f"{row['steps_lost_allowed']} | {row['wrong']} |"
        )
    trials, wrong = (sum(row[key] for row in rows) for key in ("trials", "wrong"))
    return "\n".join([*lines, f"| all | {trials} | {max(r['steps_lost_most'] for r in rows)} | | {wrong} |"])


def other_kinds(outcomes: list[Any], kinds: list[str]) -> str:
    """Names a trial that has another fault than ``kinds`` give its number, as after another --only; or nothing."""
    other = [outcome for outcome in outcomes if outcome.fault != kinds[outcome.trial % len(kinds)]]
    return f"trial {other[0].trial} of {other[0].fault}, begun with another choice of faults" if other else ""


def not_of_now(outcomes: list[Any], numbers: list[int], commit: str) -> str:
    """Why these outcomes do not speak for today's code, or nothing."""
    others = sorted({outcome.commit or "unknown" for outcome in outcomes if outcome.commit != commit})
    if others:
        return f"trials of commit {', '.join(others)}, not {commit}"
    return "" if {*numbers} - {outcome.trial for outcome in outcomes} else "all of these trials already"


def processor_seconds() -> float:
    """Of this process and of all that have ended under it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run_trials(lab: Any, numbers: list[int], kinds: list[str], outcomes: list[Any], out: Path) -> None:
    """Runs the trials that have no outcome yet."""
    from fault_kinds import FAULTS
    from fault_trials import Trial

    from nemo_slam.training.environment import environment

    commit = environment()["commit"]
    for number in numbers:
        if any(outcome.trial == number for outcome in outcomes):
            continue
        trial = Trial(lab, number, kinds[number % len(kinds)])
        trial.outcome.commit = commit
        began, used = time.perf_counter(), processor_seconds()
        FAULTS[trial.outcome.fault](trial)
        trial.outcome.seconds = round(time.perf_counter() - began, 1)
        trial.outcome.cpu_seconds = round(processor_seconds() - used, 1)
        outcomes.append(trial.outcome)
        with out.open("a") as file:
            file.write(json.dumps(asdict(trial.outcome)) + "\n")
        print(f"{number:3d} {trial.outcome.fault}: {trial.outcome.wrong or 'kept'}; {trial.outcome.detail}", flush=True)
        if trial.outcome.wrong:  # what went wrong stays to be looked at, beside the results
            for path in lab.folder.glob(f"{trial.runs.name}*"):
                target = out.with_suffix("") / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(path, target, dirs_exist_ok=True) if path.is_dir() else shutil.copy(path, target)
        trial.remove()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--trial", type=int, help="this one alone")
    parser.add_argument("--seed", type=int, help="default: another one each time, or that of --out")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: all, in turn")
    parser.add_argument("--out", type=Path, default=Path("runs/faults.jsonl"), help="default: %(default)s")
    options = parser.parse_args()

    from small_disks import own_mounts

    kinds, not_run = options.only, {}
    if NEED_MOUNTS & {*kinds} and (reason := own_mounts()):
        not_run = {kind: reason for kind in kinds if kind in NEED_MOUNTS}
        kinds = [kind for kind in kinds if kind not in not_run]
        print(f"cannot run here: {', '.join(not_run)}: {reason}", flush=True)
        if not kinds:
            return 1

    import torch
    from fault_trials import Lab, Outcome

    import nemo_slam.training.pretrain  # noqa: F401  imported once: each process is a fork of this one
    from nemo_slam.training.environment import environment

    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.is_file() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    seed = options.seed
    if seed is None:
        seed = outcomes[0].seed if outcomes else int.from_bytes(os.urandom(4), "big")
    if options.trial is not None:  # done again, whatever --out holds of it; --out stays as it is
        outcomes, options.out = [], options.out.with_name(f"{options.out.stem}_trial_{options.trial}.jsonl")
        options.out.unlink(missing_ok=True)
    elif outcomes and outcomes[0].seed != seed:
        parser.error(f"{options.out} holds trials of seed {outcomes[0].seed}: name another --out, or remove it")
    elif problem := other_kinds(outcomes, kinds):
        parser.error(f"{options.out} holds {problem}: name another --out, or remove it")
    numbers = [options.trial] if options.trial is not None else list(range(options.trials))
    if outcomes and (problem := not_of_now(outcomes, numbers, environment()["commit"])):
        parser.error(f"{options.out} holds {problem}: name another --out, or remove it")
    print(f"seed {seed}; --seed {seed} --trial N repeats trial N (with the same --only)", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        run_trials(Lab(Path(folder), seed), numbers, kinds, outcomes, options.out)
    rows = summary(outcomes)
    print(table(rows))
    if options.trial is None and {*options.only} == {*KINDS}:
        result = {
            "benchmark": "faults",
            **environment(),
            "seed": seed,
            "trials": len(outcomes),
            "wrong_resumes": sum(row["wrong"] for row in rows),
            "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
            "cpu_seconds": round(sum(outcome.cpu_seconds for outcome in outcomes), 1),
            "not_run": not_run,
            "faults": rows,
            "outcomes": [{**asdict(outcome), "lost": outcome.lost} for outcome in outcomes],
        }
        path = RESULTS / f"faults_{datetime.now():%Y-%m-%dT%H%M%S}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
