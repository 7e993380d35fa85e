"""Times training steps: our encoder against NeMo's of the same size on the same batches, and a full step by part.

    python benchmarks/train_step.py --model tiny                  a CPU, about two minutes
    python benchmarks/train_step.py --model slam --fp8 gemm attention --mixes shuffled bucketed bucketed:64000
                                                                  the paper's 600M on an H100

Encoders: forward, backward and optimizer on log-mel of ragged batches; ours packs them, NeMo's pads. Frames are real
ones, of 10 ms, never padding. Mixes: batches of any lengths, of half of the lengths, of neighbouring lengths.
Implementations take turns, batch by batch, and each batch counts with its median. The result file is rewritten after
each of them: a run that is cut short loses what it did not reach, and one that lacks memory goes on with the next.

On a CPU the clock is processor time on one thread, which other programs on the machine hardly disturb. On a GPU it is
CUDA events around whole steps; precision is bfloat16 under autocast over float32 weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="tiny", help="tiny, base or slam (conf/model)")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--frames", type=int, help="10 ms frames of a batch (default: 6000 on a CPU, 32000 on a GPU)")
    made.add_argument("--batches", type=int, default=4, help="batches of each mix")
    made.add_argument("--repeats", type=int, default=5, help="times that each batch is timed, after one to warm up")
    made.add_argument(
        "--mixes",
        nargs="+",
        default=["shuffled", "loose", "bucketed", "sorted"],
        metavar="MIX",
        help="shuffled, loose, bucketed or sorted; bucketed:64000 for batches of as many frames",
    )
    made.add_argument("--fp8", nargs="*", default=[], choices=("gemm", "attention"), help="our encoder in FP8 too")
    made.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the config, as for training"
    )
    made.add_argument("--no-stock", action="store_true", help="without NeMo's encoder")
    made.add_argument("--no-step", action="store_true", help="without the pre-training step by part")
    made.add_argument("--out", type=Path, help="result file (default: results/train_step_<device>_<time>.json)")
    return made


def full_step(config: Any, batches: list[Any], device: Any, repeats: int) -> dict:
    """Medians of a pre-training step's parts, summed over the batches."""
    import torch
    from step_flops import step as flops_of
    from step_parts import PARTS, MeasuredStep
    from step_workload import pretraining_model, step_batch, tokenizer

    from nemo_slam.training.optimizers import FastestAdamW

    with tokenizer(config.model.text_encoder.vocab_size) as tokenizer_model:
        torch.manual_seed(0)
        model = pretraining_model(config, tokenizer_model).to(device).train()
    optimizer = FastestAdamW(model.parameters(), lr=0.0)
    measured = MeasuredStep(model, optimizer, device)
    parts = dict.fromkeys(PARTS, 0.0)
    frames = tokens = positions = 0
    work = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number, utterances in enumerate(batches):
        batch = step_batch(utterances, number)
        _, outputs = measured(batch)
        measured.timeline.seconds()
        samples = []
        for _ in range(repeats):
            measured(batch)
            samples.append(measured.timeline.seconds())
        for part in PARTS:
            parts[part] += statistics.median(sample[part] for sample in samples)
        volume = outputs.volume(batch)
        frames, tokens = frames + int(volume["frames"]), tokens + int(volume["tokens"])
        positions += int(volume["positions"])
        work += 3 * flops_of(
            outputs.mel_lengths,
            outputs.packed_speech.layout.lengths[:-1],
            outputs.packed.layout.lengths[:-1],
            sum(len(masked.index) for masked in outputs.masked_speech.values()),
            sum(len(masked.index) for masked in outputs.masked_text.values()),
            config.model,
        )
    seconds = sum(parts.values())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "batches": len(batches),
        "frames": frames,
        "tokens": tokens,
        "packed_positions": positions,
        "seconds": seconds,
        "parts_seconds": parts,
        "frames_per_second": frames / seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_second": work / seconds,
        "peak_bytes": peak,
    }


def peak_flops(device: Any) -> tuple[float, str]:
    """What utilisation is a share of: the maker's bfloat16 peak, or a large float32 product on this CPU."""
    import torch
    from step_encoders import timed

    from nemo_slam.planning.hardware import GPUS

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, gpu in GPUS.items():
            if key in name.lower():
                return gpu.half, f"{key.upper()}, dense bfloat16, the maker's figure"
        size, dtype, source = 8192, torch.bfloat16, "a product of 8192 x 8192 bfloat16 matrices in this run"
    else:
        size, dtype, source = 768, torch.float32, "a product of 768 x 768 float32 matrices in this run"
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = min(timed(lambda: a @ a, device) for _ in range(12))
    return 2 * size**3 / best, source


def show(result: dict) -> None:
    """A table on the terminal."""
    peak = result["peak_flops_per_second"]
    print(f"{result['device']}, torch {result['torch']}: {result['parameters'] / 1e6:.1f} M parameters in the encoder")
    print(f"utilisation is of {peak / 1e12:.2f} Tflop/s: {result['peak_source']}")
    good = [row for row in result["encoders"] if "error" not in row]
    stock = {row["mix"]: row["frames_per_second"] for row in good if row["implementation"] == "stock"}
    for row in result["encoders"]:
        line = f"  {row['mix']:14s} padding {row['padding_share']:5.1%}  {row['implementation']:20s}"
        if "error" in row:
            print(f"{line}  {row['error']}")
            continue
        line += f"{row['frames_per_second']:12,.0f} frames/s  {row['flops_per_second'] / peak:6.1%}"
        if row["peak_bytes"]:
            line += f"  {row['peak_bytes'] / 2**30:6.1f} GiB"
        if row["mix"] in stock:
            line += f"  {row['frames_per_second'] / stock[row['mix']]:.2f}x stock"
        print(line)
    for name, step in result["steps"].items():
        if "error" in step:
            print(f"  full step, {name}: {step['error']}")
            continue
        speed = f"{step['frames_per_second']:,.0f} frames/s, {step['tokens_per_second']:,.0f} tokens/s"
        print(f"  full step, {name}: {speed}, {step['flops_per_second'] / peak:.1%}")
        for part, seconds in step["parts_seconds"].items():
            print(f"    {part:20s}{seconds / step['seconds']:6.1%}  {1e3 * seconds / step['batches']:9.1f} ms a step")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    import torch
    from omegaconf import OmegaConf
    from step_encoders import Encoders, compare, release
    from step_goals import lines, of_train_step
    from step_workload import batches, forget_scales, our_encoder, resolved_config

    from nemo_slam.training.environment import environment

    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        print("--device cuda: this machine has no CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda" if options.device == "cuda" or (options.device == "auto" and cuda) else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    budget = options.frames or (32_000 if device.type == "cuda" else 6_000)
    config = resolved_config(options.model, "slam_stage2", options.set)
    budgets = {mix: int(mix.partition(":")[2] or budget) for mix in options.mixes}
    mixes = {mix: batches(mix.partition(":")[0], frames, options.batches) for mix, frames in budgets.items()}
    names = [*([] if options.no_stock else ["stock"]), "ours", *(f"ours, fp8 {mode}" for mode in options.fp8)]
    peak, source = peak_flops(device)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in our_encoder(config).parameters())
    result = {
        **environment(),
        "benchmark": "train_step",
        "arguments": arguments,
        "model": options.model,
        "conformer": OmegaConf.to_container(config.model.conformer),
        "parameters": parameters,
        "clock": "CUDA events" if device.type == "cuda" else "processor time, one thread",
        "load_average": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").is_file() else None,
        "peak_flops_per_second": peak,
        "peak_source": source,
        "encoders": [],
        "steps": {},
        "goals": [],
    }
    kind = device.type if device.type == "cpu" else result["device"].replace(" ", "_")
    stamp = result["time"].replace(":", "").replace("+0000", "")
    out = options.out or RESULTS / f"train_step_{options.model}_{kind}_{stamp}.json"
    out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        result["goals"] = of_train_step(result)
        out.write_text(json.dumps(result, indent=1) + "\n")

    def add(row: dict) -> None:
        result["encoders"].append(row)
        write()

    compare(names, mixes, Encoders(config, device), options.repeats, add)
    if not options.no_step:
        bucketed = [mix for mix in mixes if mix.partition(":")[0] == "bucketed"]
        # The largest batch first; a smaller one where memory does not hold a whole step of it.
        candidates = sorted(bucketed or options.mixes[-1:], key=lambda mix: -budgets[mix])
        for mode in ("none", *options.fp8):
            changed = OmegaConf.merge(config, {"model": {"conformer": {"fp8": mode}}})
            for mix in candidates:
                key = f"{mix}, fp8 {mode}"
                try:
                    result["steps"][key] = full_step(changed, mixes[mix], device, options.repeats)
                except torch.cuda.OutOfMemoryError:
                    result["steps"][key] = {"error": "out of memory"}
                release(device)
                forget_scales()
                write()
                if "error" not in result["steps"][key]:
                    candidates = [mix]  # the same for every mode, so that they can be compared
                    break
    show(result)
    print(*lines(result["goals"]), f"written: {out}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
