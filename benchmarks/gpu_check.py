"""Everything that wants a GPU, in one command and under nine minutes on an H100: ``make gpu-check``.

Tests on the GPU; a training step at 600M against NeMo's encoder, in bfloat16 and FP8; FP8's losses beside bfloat16's;
every kernel against the roofline. One after the other, each in a process with a time limit; one that fails does not
stop the others. Results go to ``benchmarks/results/gpu_check_<device>_<time>/``, with a summary that is rewritten after
each part. Without a GPU it says so and fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

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
    step = ["benchmarks/train_step.py", "--model", "slam", "--device", "cuda", "--batches", "2", "--repeats", "4"]
    step += ["--frames", "32000", "--mixes", "shuffled", "bucketed", *(["--fp8", *fp8] if fp8 else [])]
    found = [
        Part("tests", ["-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junitxml={folder / 'tests.xml'}"], 170),
        Part("train_step", [*step, "--out", str(folder / "train_step.json")], 170),
    ]
    if fp8:
        losses = ["benchmarks/fp8_losses.py", "--modes", *fp8, "--out", str(folder / "fp8_losses.json")]
        found.append(Part("fp8_losses", losses, 110))
    kernels = ["kernels/benchmarks/benchmark.py", "--seconds", "0.1", "--no-compile", "--no-nemo"]
    return [*found, Part("kernels", [*kernels, "--out", str(folder / "kernels.json")], 130)]


def run(part: Part, folder: Path, limit: float) -> dict:
    """Runs a part; its output goes to a log beside the results, and its end to the terminal."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    log = folder / f"{part.name}.log"
    begin = time.perf_counter()
    with log.open("w") as file:
        try:
            command = [sys.executable, *part.command]
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
            outcome = "passed" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"cut after {limit:.0f} s"
    tail = log.read_text(errors="replace").splitlines()[-25:]
    seconds = time.perf_counter() - begin
    print(f"== {part.name}: {outcome} ({seconds:.0f} s)", *(f"   {line}" for line in tail), sep="\n", flush=True)
    return {"outcome": outcome, "seconds": seconds, "command": part.command}


def count_tests(report: Path) -> dict[str, int] | None:
    """How many tests passed, failed and were skipped; None without a report."""
    if not report.is_file():
        return None
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, bad, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "skipped"))
    bad += int(suite.get("errors", 0))
    return {"passed": total - bad - skipped, "failed": bad, "skipped": skipped}


def main(arguments: list[str]) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", help="names of parts: tests, train_step, fp8_losses, kernels")
    options = made.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU that torch can use, and this machine has none.", file=sys.stderr)
        return 1

    from nemo_slam.modules import fp8
    from nemo_slam.training.environment import environment

    description = environment()
    stamp = str(description["time"]).replace(":", "").replace("+0000", "")
    folder = RESULTS / f"gpu_check_{str(description['device']).replace(' ', '_')}_{stamp}"
    folder.mkdir(parents=True)
    device = torch.device("cuda")
    reasons = {mode: fp8.unavailable(mode, device) for mode in ("gemm", "attention")}
    modes = [mode for mode, reason in reasons.items() if reason is None]
    for mode, reason in reasons.items():
        print(f"fp8 {mode}: {'available' if reason is None else reason}", flush=True)
    summary = {**description, "fp8_unavailable": reasons, "parts": {}}
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
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    failed = [name for name, result in summary["parts"].items() if result["outcome"] != "passed"]
    print(f"{time.perf_counter() - begin:.0f} s; results: {folder}")
    if failed:
        print(f"not passed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
