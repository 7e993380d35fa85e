"""Trains a very small model for twenty minutes and asks what grows: steady throughput, flat memory, no leaked files.

    python benchmarks/soak.py                    # 20 minutes; benchmarks/results/soak_<time>.json
    python benchmarks/soak.py --minutes 2 --out /tmp/soak.json

The run is stage 2 with everything that a long run does again and again: loader workers, a row that cannot be read,
metrics, TensorBoard, validation, checkpoints of which old ones are dropped. The process tree is looked at every few
seconds, and SIGTERM ends it. The first third is compared with the last; the minutes before the first checkpoints and
validations are left out. The exit status is 1 if an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
EVERY_SECONDS = 5.0
WARM_UP = 0.1
"""Share of the time that comes before the first third."""
SAVE_EVERY, VALIDATE_EVERY = 100, 150
SLOWDOWN, GROWTH_MIB = 0.1, 16.0
"""Aims: throughput (steps for a second of processor time) falls by at most a tenth; memory grows by no more."""


def overrides(workers: int) -> list[str]:
    return [
        "trainer.max_steps=10000000",
        "trainer.log_every_n_steps=5",
        f"trainer.val_check_interval={VALIDATE_EVERY}",
        f"checkpoint.every_n_steps={SAVE_EVERY}",
        "checkpoint.keep_last=2",
        "exp_manager.create_tensorboard_logger=true",
        f"data.num_workers={workers}",
    ]


def summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    """The first third against the last, and the line through all.

    >>> samples = [dict(seconds=s, step=2 * s, cpu_seconds=s / 2, resident_mib=90.0, open_files=7) for s in range(100)]
    >>> found = summary(samples)
    >>> found["steps_per_cpu_second"]["first"], found["resident_mib"]["growth"], found["open_files"]["largest"]
    (4.0, 0.0, 7)
    """
    import numpy as np

    steady = samples[int(len(samples) * WARM_UP) :]
    third = len(steady) // 3
    if third < 2:
        raise ValueError(f"{len(samples)} samples are too few to compare thirds of")
    thirds = {"first": steady[:third], "last": steady[-third:]}
    found: dict[str, Any] = {}
    for name, clock in (("steps_per_second", "seconds"), ("steps_per_cpu_second", "cpu_seconds")):
        rates = {t: (s[-1]["step"] - s[0]["step"]) / (s[-1][clock] - s[0][clock]) for t, s in thirds.items()}
        found[name] = {**rates, "ratio": rates["last"] / rates["first"]}
    hours = np.array([s["seconds"] for s in steady]) / 3600
    for name in samples[0]:
        if name not in ("seconds", "step", "cpu_seconds"):
            values = np.array([s[name] for s in steady])
            means = {t: float(np.median([x[name] for x in s])) for t, s in thirds.items()}
            found[name] = {
                **means,
                "growth": means["last"] - means["first"],
                "per_hour": round(float(np.polyfit(hours, values, 1)[0]), 3),
                "largest": values.max().item(),
            }
    return found


def table(result: dict[str, Any]) -> str:
    """As docs/faults.md has it."""
    lines = ["| | first third | last third |", "|---|---|---|"]
    found = result["summary"]
    for name, title, form in (
        ("steps_per_cpu_second", "steps for a second of processor time", ".2f"),
        ("steps_per_second", "steps for a second of the clock", ".2f"),
        ("resident_mib", "resident memory of all processes, MiB", ".1f"),
        ("open_files", "open files", ".0f"),
        ("threads", "threads", ".0f"),
    ):
        lines.append(f"| {title} | {found[name]['first']:{form}} | {found[name]['last']:{form}} |")
    return "\n".join(lines)


def soak(folder: Path, minutes: float, workers: int) -> tuple[list[dict[str, float]], int]:
    """Samples of a run of so many minutes, and the status with which SIGTERM ended it."""
    from fault_bench import config, make_corpus, start
    from process_tree import usage

    make_corpus(folder / "corpus")
    (folder / "corpus" / "3.wav").write_bytes(b"not audio")
    cfg = config(folder / "corpus", folder, "run", *overrides(workers))
    attempt = start(cfg, folder / "log")
    attempt.wait(lambda: attempt.steps >= 1)
    began, samples = time.monotonic(), []
    while attempt.alive() and time.monotonic() - began < minutes * 60:
        now = {"seconds": round(time.monotonic() - began, 2), "step": attempt.steps}
        samples.append({**now, **asdict(usage(attempt.pids[0]))})
        time.sleep(EVERY_SECONDS)
    attempt.kill(signal.SIGTERM)
    status = attempt.finish()[0]
    if status != 128 + signal.SIGTERM:
        print(attempt.log.read_text(errors="replace")[-3000:], file=sys.stderr)
    return samples, status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="loading processes; default: %(default)s")
    parser.add_argument("--out", type=Path, help="result file (default: results/soak_<time>.json)")
    options = parser.parse_args()
    if options.minutes * 60 < 20 * EVERY_SECONDS:
        parser.error(f"--minutes must be at least {20 * EVERY_SECONDS / 60:.1f}")

    import torch

    import nemo_slam.training.pretrain  # noqa: F401  imported once: the run is a fork of this process
    from nemo_slam.training.environment import environment

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        samples, status = soak(Path(folder), options.minutes, options.workers)
    found = summary(samples)
    ended_well = {"ended_by_sigterm": status == 128 + signal.SIGTERM}
    met = {
        **ended_well,
        "throughput": found["steps_per_cpu_second"]["ratio"] >= 1 - SLOWDOWN,
        "memory": found["resident_mib"]["growth"] <= GROWTH_MIB,
        "open_files": found["open_files"]["growth"] <= 0,
        "threads": found["threads"]["growth"] <= 0,
    }
    result = {
        "benchmark": "soak",
        **environment(),
        "minutes": options.minutes,
        "workers": options.workers,
        "steps": samples[-1]["step"],
        "checkpoints": samples[-1]["step"] // SAVE_EVERY,
        "validations": samples[-1]["step"] // VALIDATE_EVERY,
        "cpu_seconds": samples[-1]["cpu_seconds"],
        "summary": found,
        "within_aims": met,
        "samples": samples[:: max(1, len(samples) // 60)],
    }
    out = options.out or RESULTS / f"soak_{datetime.now():%Y-%m-%dT%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    missed = [name for name, is_met in met.items() if not is_met]
    print(f"{samples[-1]['step']} steps; {'missed: ' + ', '.join(missed) if missed else 'every aim met'}")
    print(f"{table(result)}\n{out}")
    return int(not all(met.values()))


if __name__ == "__main__":
    sys.exit(main())
