"""One training step of the paper's model on a CPU, as a user would run it: does it fit, and how long does it take?

    python benchmarks/slam_step.py                # 612M parameters: minutes, about 13 GB of memory, 8 GB of disk
    python benchmarks/slam_step.py model=tiny     # the measurement itself, in a minute

Runs ``scripts/speech_pretrain.py --config-name slam_stage1 trainer.max_steps=1`` on the demonstration corpus: forward,
backward, optimizer, a checkpoint and the .nemo. Memory is the resident memory of the process and its loading workers
together, read ten times a second; pages that they share count more than once. Writes
benchmarks/results/slam_step_cpu_<time>.json and exits with 1 if the limit is passed.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int) -> int:
    """Of a process and its descendants; those that have just ended count nothing."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        children = [c for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]
    except OSError:
        return 0
    return own + sum(resident_bytes(int(child)) for child in children)


def measure(command: list[str]) -> tuple[float, int]:
    """Wall time of a command, and its peak."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"slam_step: the run ended with status {process.returncode}")
    return time.perf_counter() - begin, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gib", type=float, default=24.0, help="memory that the run must stay below")
    parser.add_argument("--out", type=Path, help="result file (default: results/slam_step_cpu_<time>.json)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config, as for training")
    options = parser.parse_args()

    arguments = ["--config-name", "slam_stage1", "trainer.max_steps=1", "trainer.log_every_n_steps=1"]
    arguments += ["trainer.accelerator=cpu", *options.overrides]
    with tempfile.TemporaryDirectory(prefix="slam_step_") as folder:
        placed = [f"exp_manager.exp_dir={folder}", "name=step"]
        seconds, peak = measure([sys.executable, "scripts/speech_pretrain.py", *arguments, *placed])
        run = Path(folder) / "step"
        with (run / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["loss"]]
        from nemo_slam.training.environment import environment

        result = {
            "benchmark": "slam_step",
            **environment(),
            "arguments": arguments,
            "load_average": os.getloadavg()[0],
            "seconds": round(seconds, 1),
            "step_seconds": round(float(rows[-1]["seconds"]), 1),
            "peak_gib": round(peak / 2**30, 2),
            "largest_process_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
            "limit_gib": options.limit_gib,
            "checkpoint_bytes": max(path.stat().st_size for path in (run / "checkpoints").iterdir()),
            "metrics": {name: float(value) for name, value in rows[-1].items() if value},
        }
    assert [int(row["step"]) for row in rows] == [1], "the run must have trained one step"
    assert math.isfinite(result["metrics"]["loss"]), "the step's loss is not a number"
    print(json.dumps(result, indent=1))
    out = options.out or RESULTS / f"slam_step_cpu_{result['time'].replace(':', '').replace('+0000', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}", file=sys.stderr)
    return 0 if result["peak_gib"] < options.limit_gib else 1


if __name__ == "__main__":
    sys.exit(main())
