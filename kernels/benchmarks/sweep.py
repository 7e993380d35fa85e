"""Times the passes of the fused convolution over ways to cut them, on a GPU: what `tile` should say.

    python kernels/benchmarks/sweep.py [--channels 1024] [--taps 5] [--seconds 0.2]

Prints a pass's cuts from fastest to slowest. Nothing is changed: the winner is for a person to write into `tile`.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
import workloads
from measure import Meter

from slam_kernels import triton_unavailable


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--taps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2)
    options = parser.parse_args(arguments)
    reason = triton_unavailable("cuda") if torch.cuda.is_available() else "no CUDA device"
    if reason is not None:
        print(f"Nothing measured: {reason}.")
        return 0

    from slam_kernels.fused import glu_conv_group_norm_silu as fused

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

    for name in ("statistics", "normalise", "norm_gradient", "input_gradient"):
        results = []
        for rows, lane, unroll, warps in itertools.product(
            (32, 64, 128), (2, 4, 8), sorted({1, 2, options.taps}), (1, 2, 4)
        ):
            cut = fused.Tile(rows, min(32 * lane * warps, channels), unroll, warps)
            fused.tile = lambda pass_name, *rest, cut=cut, name=name: (
                cut if pass_name == name else original(pass_name, *rest)
            )
            forward = name in ("statistics", "normalise")
            results.append((meter.time(lambda f=forward: run(f)).median_ms, cut))
        fused.tile = original
        base = meter.time(lambda f=forward: run(f)).median_ms
        print(f"{name}: now {original(name, channels, options.taps, 2)} {base:.4f} ms for its direction")
        for milliseconds, cut in sorted(results, key=lambda r: r[0])[:8]:
            print(f"  {milliseconds:.4f} ms  {cut}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
