"""Everything that wants a GPU, in one command and under nine minutes on an H100: ``make gpu-check``.

Tests on the GPU; every kernel against the roofline; a training step at 600M against NeMo's encoder, in bfloat16 and
FP8; FP8's losses beside bfloat16's. One after the other, each in a process with a time limit; one that fails or is cut
does not stop the others, and keeps what it had written. Results go to
``benchmarks/results/gpu_check_<device>_<time>/``: a file a part, all output in ``log.txt``, and ``summary.json``,
rewritten after each part, with the project's goals beside what was measured. Without a GPU it says so and fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_goals import lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
LIMIT = 520.0
"""Seconds for everything; a part that would exceed it is cut, and counts as failed."""


@dataclass(frozen=True)
class Part:
    """A command, and the most seconds it may take."""

    name: str
    command: list[str]
    seconds: float


def parts(folder: Path, fp8: list[str]) -> list[Part]:
    """In the order of what is missed most if time runs out."""
    report = str(folder / "tests.xml")
    tests = ["-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None:  # most of their time, processors compile kernels
        tests += ["-n", str(max(min((os.cpu_count() or 1) // 2, 6), 1)), "--dist", "worksteal"]
    kernels = ["kernels/benchmarks/benchmark.py", "--seconds", "0.1", "--compile", "first", "--no-nemo", "--slices"]
    step = ["benchmarks/train_step.py", "--model", "slam", "--device", "cuda", "--batches", "2", "--repeats", "4"]
    step += ["--frames", "32000", "--mixes", "shuffled", "bucketed", "bucketed:64000"]
    step += ["--fp8", *fp8] if fp8 else []
    found = [
        Part("tests", tests, 150),
        Part("kernels", [*kernels, "--tests", report, "--out", str(folder / "kernels.json")], 110),
        Part("train_step", [*step, "--out", str(folder / "train_step.json")], 180),
    ]
    if fp8:
        losses = ["benchmarks/fp8_losses.py", "--modes", *fp8, "--out", str(folder / "fp8_losses.json")]
        found.append(Part("fp8_losses", losses, 110))
    return found


def run(part: Part, folder: Path, limit: float) -> dict:
    """Runs a part; its output goes to a log beside the results, and its end to the terminal."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # tests run in several processes already
    log = folder / "log.txt"
    begin = time.perf_counter()
    with log.open("a+b") as file:
        before = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, so that none of its processes outlives it on the GPU
        )
        try:
            code = process.wait(limit)
            outcome = "passed" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"cut after {limit:.0f} s"
        finally:
            stop(process)
        file.seek(before)
        tail = file.read().decode(errors="replace").splitlines()[-25:]
    seconds = time.perf_counter() - begin
    print(f"== {part.name}: {outcome} ({seconds:.0f} s)", *(f"   {line}" for line in tail), sep="\n", flush=True)
    return {"outcome": outcome, "seconds": seconds, "command": part.command}


def stop(process: subprocess.Popen) -> None:
    """End a part and whatever it started. First as Ctrl-C does, at which pytest still writes its report."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def count_tests(report: Path) -> dict[str, Any] | None:
    """How many tests passed, failed and were skipped, and which failed with what; None without a report."""
    if not report.is_file():
        return None
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((child for tag in ("failure", "error") for child in case.iter(tag)), None)
        if bad is not None:
            found["failures"][f"{case.get('classname')}::{case.get('name')}"] = bad.get("message", "")[:500]
        kind = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        found[kind] += 1
    return found


def goals(folder: Path) -> list[dict]:
    """Of all parts that have written any."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name != "summary.json":
            found += json.loads(path.read_text()).get("goals", [])
    return found


def main(arguments: list[str]) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", help="names of parts: tests, kernels, train_step, fp8_losses")
    made.add_argument("--out", type=Path, help="folder of the results (default: one of its own in results/)")
    options = made.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU that torch can use, and this machine has none.", file=sys.stderr)
        return 1

    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # also where nothing is installed
    from nemo_slam.modules import fp8
    from nemo_slam.training.environment import environment

    description = environment()
    stamp = str(description["time"]).replace(":", "").replace("+0000", "")
    folder = options.out or RESULTS / f"gpu_check_{str(description['device']).replace(' ', '_')}_{stamp}"
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    reasons = {mode: fp8.unavailable(mode, device) for mode in ("gemm", "attention")}
    modes = [mode for mode, reason in reasons.items() if reason is None]
    for mode, reason in reasons.items():
        print(f"fp8 {mode}: {'available' if reason is None else reason}", flush=True)
    summary: dict[str, Any] = {**description, "fp8_unavailable": reasons, "parts": {}, "goals": []}
    begin = time.perf_counter()
    for part in parts(folder, modes):
        if options.only and part.name not in options.only:
            continue
        left = LIMIT - (time.perf_counter() - begin)
        if left < 20:
            result = {"outcome": "no time left", "seconds": 0.0, "command": part.command}
        else:
            result = run(part, folder, min(part.seconds, left))
        if part.name == "tests":
            result["tests"] = count_tests(folder / "tests.xml")
            if result["outcome"] == "passed" and (result["tests"] or {}).get("passed", 0) == 0:
                result["outcome"] = "failed: every test was skipped"
        summary["parts"][part.name] = result
        summary["goals"] = goals(folder)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    failed = [name for name, result in summary["parts"].items() if result["outcome"] != "passed"]
    for name, message in ((summary["parts"].get("tests") or {}).get("tests") or {}).get("failures", {}).items():
        print(f"  failed: {name}: {message.splitlines()[0] if message else ''}")
    print(*lines(summary["goals"]), f"{time.perf_counter() - begin:.0f} s; results: {folder}", sep="\n")
    if failed:
        print(f"not passed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
