"""Times every operator and the whole convolution module on a GPU and writes a result file.

    python kernels/benchmarks/benchmark.py [--only TEXT] [--seconds S] [--no-nemo] [--compile first] [--slices]

Forward, backward's share and both, and memory, against the PyTorch twin, PyTorch's own operators on the padded batch,
NeMo's module, torch.compile, and the roofline with the copy bandwidth of the same run. What the project's goals ask for
comes first, and the result file is rewritten after each workload: a run that is cut short loses what it did not reach.
A speed-up is printed only for an operator whose GPU tests pass in this run, or in the report that ``--tests`` names.
``--smoke`` runs tiny shapes on the CPU, which measures nothing and proves that the benchmark itself works. Without a
GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import goals
import torch
import workloads
from measure import Meter

from slam_kernels import triton_unavailable

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
TESTS = ROOT / "tests" / "gpu" / "test_kernels_gpu.py"
REFERENCE = "triton"


def environment(device: torch.device) -> dict:
    """Device, versions, commit."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""  # no git on this machine

    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "torch": torch.__version__,
        "triton": version,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "kernels", "tests")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def failing_operators(finished: Path | None) -> set[str] | None:
    """GPU tests that failed or that the run did not reach; None if the tests could not run at all.

    Args:
        finished: a JUnit report of a run that has just been; None runs the tests now.
    """
    if finished is not None:
        cases = list(ElementTree.parse(finished).iter("testcase")) if finished.is_file() else []
        return _failing([case for case in cases if case.get("classname", "").endswith("test_kernels_gpu")])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        subprocess.run([*command, str(TESTS)], cwd=ROOT, env=environment, capture_output=True, text=True)
        return _failing(list(ElementTree.parse(report).iter("testcase")) if report.exists() else [])


def _failing(cases: list[ElementTree.Element]) -> set[str] | None:
    if not cases or all(case.find("skipped") is not None for case in cases):
        return None
    bad = [c.get("name", "") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    seen = {c.get("name", "").partition("[")[0] for c in cases}
    missing = set(re.findall(r"^def (test_\w+)", TESTS.read_text(), re.MULTILINE)) - seen  # of a run that was cut
    return {name.removeprefix("test_") for name in [*bad, *(f"{name} (did not run)" for name in missing)]}


def is_red(operator: str, failing: set[str] | None) -> bool:
    """Whether a speed-up of this operator may not be shown."""
    if failing is None:
        return True
    name = "glu_conv_group_norm_silu" if operator == "convolution module" else operator.split(" ")[0]
    return any(test.startswith(name) for test in failing)


def time_workload(work: workloads.Workload, meter: Meter, bandwidth: float) -> list[dict]:
    """One row for each implementation."""
    rows = []
    for name, function in work.implementations.items():
        row = {"operator": work.operator, "mix": work.mix, "implementation": name}
        forward_limit, both_limit = work.limits(name, bandwidth)
        try:
            with torch.no_grad():
                forward = meter.time(function)
            row["forward"] = asdict(forward)
            row["forward_limit_ms"] = forward_limit * 1e3
            if work.inputs:
                with torch.no_grad():
                    grad = torch.randn_like(function())
                both = meter.time(lambda f=function, g=grad: _both(f, work.inputs, g))
                row["both"] = asdict(both)
                row["backward_ms"] = both.median_ms - forward.median_ms
                row["both_limit_ms"] = both_limit * 1e3
        except torch.cuda.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:  # one implementation that fails must not take the others' figures with it
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        if "error" in row and meter.device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
    return rows


def _both(function, inputs, grad) -> None:
    function().backward(grad)
    for tensor in inputs:
        tensor.grad = None  # not before: the memory of one call's gradients would be taken for the next one's inputs


def show(rows: list[dict], failing: set[str] | None) -> None:
    """Prints a workload's rows; speed-ups only for a green operator."""
    head = rows[0]
    red = is_red(head["operator"], failing)
    print(f"\n{head['operator']}, {head['mix']}" + ("   [tests not green: no speed-ups]" if red else ""))
    for kind in ("forward", "both"):
        reference = next((r for r in rows if r["implementation"] == REFERENCE and kind in r), None)
        for row in rows:
            if kind not in row:
                if "error" in row and kind == "forward":
                    print(f"  {kind:8s}{row['implementation']:24s}{row['error']}")
                continue
            m = row[kind]
            limit = row[f"{kind}_limit_ms"]
            line = f"  {kind:8s}{row['implementation']:24s}{m['median_ms']:9.3f} ms  {m['peak_bytes'] / 2**20:8.0f} MiB"
            if row["implementation"] == REFERENCE:
                line += f"  limit {limit:.3f} ms, {100 * limit / m['median_ms']:.0f}% of it"
            elif reference is not None and not red:
                line += f"  triton is {m['median_ms'] / reference[kind]['median_ms']:.2f}x as fast"
                if limit != reference[f"{kind}_limit_ms"]:
                    line += f", {limit / reference[f'{kind}_limit_ms']:.2f}x by what they move"
            print(line)


def build(options: argparse.Namespace, device: torch.device) -> list:
    """Functions that make the workloads, one at a time: their inputs do not share the memory."""
    tiny, dtype = options.smoke, torch.float32 if options.smoke else torch.bfloat16
    kernels = {"twin": "torch"} if tiny else {REFERENCE: "triton", "twin": "torch"}
    channels, groups = (16, 4) if tiny else (1024, 32)
    shape = (channels, groups, 5, dtype, device, kernels)
    nemo = not (tiny or options.no_nemo)
    mixes = workloads.mixes(tiny)

    def compiled(first: bool) -> bool:
        return not tiny and (options.compile == "all" or (options.compile == "first" and first))

    def convolution(mix: str, first: bool = False):
        return lambda: [workloads.convolution(mixes[mix], mix, *shape, compiled(first))]

    def module(mix: str, first: bool = False):
        return lambda: [workloads.module(mixes[mix], mix, *shape, compiled(first), nemo)]

    def spans(mix: str):
        sizes = (5, 50) if tiny else (100, 32_000)
        return lambda: workloads.spans(mixes[mix], mix, channels, *sizes, dtype, device, kernels)

    def contrastive(rows: int):
        size = (rows, 8, 3) if tiny else (rows, 1024, 100)
        return lambda: [workloads.contrastive(*size, dtype, device, kernels, True)]

    def entropy(size: tuple[int, int, int], first: bool = False):
        return lambda: [workloads.entropy(*size, dtype, device, kernels, compiled(first))]

    first, *others = mixes
    largest, *smaller = (12,) if tiny else (16_384, 2_048)
    vocabularies = ((10, 8, 20),) if tiny else ((4_096, 1024, 32_000), (8_192, 1024, 1024))
    makers = [convolution(first, True), contrastive(largest), entropy(vocabularies[0], True), module(first, True)]
    makers += [spans(first), *map(contrastive, smaller), *map(entropy, vocabularies[1:])]
    for mix in others:
        makers += [convolution(mix), module(mix), spans(mix)]
    return makers


def try_slices(meter: Meter, device: torch.device) -> list[dict]:
    """The variant whose second pass finds a slice of the channels in the L2 cache (see `run_forward`)."""
    from slam_kernels.fused.glu_conv_group_norm_silu import run_backward, run_forward

    rows, channels, groups = 16 * 1600, 1024, 32
    cu = workloads.layout([1600] * 16, device)
    x = torch.randn(rows, 2 * channels, device=device, dtype=torch.bfloat16)
    parameters = [torch.randn(s, device=device) for s in ((channels, 5), channels, channels, channels)]
    grad, dtype, results = torch.randn(rows, channels, device=device, dtype=torch.bfloat16), torch.bfloat16, []
    for slices in (1, 2, 4):
        _, mean, rstd = run_forward(x, *parameters, cu, groups, 1e-3, dtype, slices)
        forward = meter.time(lambda s=slices: run_forward(x, *parameters, cu, groups, 1e-3, dtype, s))
        backward = meter.time(
            lambda s=slices, m=mean, r=rstd: run_backward(grad, x, *parameters, cu, m, r, groups, dtype, s)
        )
        results.append({"slices": slices, "forward": asdict(forward), "backward": asdict(backward)})
        print(f"  {slices} slices: forward {forward.median_ms:.3f} ms, backward {backward.median_ms:.3f} ms")
    return results


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each measurement")
    parser.add_argument("--no-nemo", action="store_true", help="without NeMo's module (its import takes half a minute)")
    parser.add_argument(
        "--compile",
        choices=("all", "first", "none"),
        default="all",
        help="torch.compile: everywhere, for one mix, nowhere",
    )
    parser.add_argument("--tests", type=Path, help="JUnit report of the GPU tests, so that they do not run again")
    parser.add_argument("--slices", action="store_true", help="also try the variant with slices in the L2 cache")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: no measurement")
    parser.add_argument("--out", type=Path, help="result file (default: results/<device>_<time>.json)")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.smoke else "cuda")
    if not options.smoke:
        reason = triton_unavailable(device) if torch.cuda.is_available() else "no CUDA device"
        if reason is not None:
            print(f"Nothing measured: {reason}. An NVIDIA GPU is needed; --smoke checks this script.")
            return 0
    failing = None if options.smoke else failing_operators(options.tests)
    meter = Meter(device, 0.001 if options.smoke else options.seconds)
    bandwidth = meter.copy_bandwidth(2**12 if options.smoke else 2**30)
    result = {
        **environment(device),
        "smoke": options.smoke,
        "copy_bytes_per_second": bandwidth,
        "failing_tests": None if failing is None else sorted(failing),
        "rows": [],
    }
    if options.smoke:
        print("Smoke run: tiny shapes on the CPU, without Triton. These times mean nothing.")
    print(f"{result['device']}, torch {result['torch']}, triton {result['triton']}: copy {bandwidth / 1e12:.3f} TB/s")
    stamp = result["time"].replace(":", "").replace("+0000", "")
    out = options.out or RESULTS / f"{result['device'].replace(' ', '_')}_{stamp}.json"
    out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        result["goals"] = [] if options.smoke else goals.of_kernels(result)
        out.write_text(json.dumps(result, indent=1) + "\n")

    for number, make in enumerate(build(options, device)):
        for work in make():
            if options.only in work.operator:
                rows = time_workload(work, meter, bandwidth)
                result["rows"] += rows
                show(rows, failing)
        write()
        if number == 1 and options.slices and not options.smoke:
            result["slices"] = try_slices(meter, device)
            write()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(*goals.lines(result["goals"]), f"\nwritten: {out}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
