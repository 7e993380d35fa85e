"""Times the passes of the fused convolution over ways to cut them, on a GPU: what `tile` should say.

    python kernels/benchmarks/sweep.py [--channels 1024] [--taps 5] [--seconds 0.05] [--jobs 8] [--passes NAME ...]

Prints a pass's cuts from fastest to slowest. Nothing is changed: the winner is for a person to write into `tile`.
Several processes first run every cut once, which fills Triton's cache on disk: compiling takes much longer than timing.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys

import torch
import workloads
from measure import Meter

from slam_kernels import triton_unavailable

PASSES = ("statistics", "normalise", "norm_gradient", "input_gradient")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--taps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument(
        "--only-compile", type=int, metavar="K", help="one of those processes: every JOBS-th cut from K"
    )
    options = parser.parse_args(arguments)
    reason = triton_unavailable("cuda") if torch.cuda.is_available() else "no CUDA device"
    if reason is not None:
        print(f"Nothing measured: {reason}.")
        return 0

    from slam_kernels.fused import glu_conv_group_norm_silu as fused

    compiling = options.only_compile is not None
    if not compiling:
        command = [sys.executable, __file__, *arguments]
        workers = [subprocess.Popen([*command, "--only-compile", str(k)]) for k in range(options.jobs)]
        if any([worker.wait() for worker in workers]):
            print("A cut does not compile or run: see above.", file=sys.stderr)
            return 1
    device, dtype, channels, groups = torch.device("cuda"), torch.bfloat16, options.channels, 32
    meter, lengths = Meter(device, options.seconds), [1600] * 16
    cu = workloads.layout(lengths, device)
    x = torch.randn(sum(lengths), 2 * channels, device=device, dtype=dtype)
    grad = torch.randn(sum(lengths), channels, device=device, dtype=dtype)
    parameters = [torch.randn(s, device=device) for s in ((channels, options.taps), channels, channels, channels)]
    _, mean, rstd = fused.run_forward(x, *parameters, cu, groups, 1e-3, dtype)
    original = fused.tile

    def run(forward: bool) -> None:
        if forward:
            fused.run_forward(x, *parameters, cu, groups, 1e-3, dtype)
        else:
            fused.run_backward(grad, x, *parameters, cu, mean, rstd, groups, dtype)

    for name in options.passes:
        results = []
        cuts = itertools.product((32, 64, 128), (2, 4, 8), sorted({2, options.taps}), (1, 2, 4))
        if compiling:
            cuts = itertools.islice(cuts, options.only_compile, None, options.jobs)
        for rows, lane, unroll, warps in cuts:
            cut = fused.Tile(rows, min(32 * lane * warps, channels), unroll, warps)
            fused.tile = lambda pass_name, *rest, cut=cut, name=name: (
                cut if pass_name == name else original(pass_name, *rest)
            )
            forward = name in ("statistics", "normalise")
            if compiling:
                run(forward)
            else:
                results.append((meter.time(lambda f=forward: run(f)).median_ms, cut))
        fused.tile = original
        if compiling:
            continue
        base = meter.time(lambda f=forward: run(f)).median_ms
        print(f"{name}: now {original(name, channels, options.taps, 2)} {base:.4f} ms for its direction")
        for milliseconds, cut in sorted(results, key=lambda r: r[0])[:8]:
            print(f"  {milliseconds:.4f} ms  {cut}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
