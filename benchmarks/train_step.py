"""Times training steps: our encoder against NeMo's of the same size on the same batches, and a full step by part.

    python benchmarks/train_step.py --model tiny                  a CPU, about two minutes
    python benchmarks/train_step.py --model slam --fp8 gemm attention     the paper's 600M on an H100

Encoders: forward, backward and optimizer on log-mel of ragged batches; ours packs them, NeMo's pads. Frames are real
ones, of 10 ms, never padding. Three mixes: batches of any lengths, of half of the lengths, of neighbouring lengths.
Implementations take turns, batch by batch, and each batch counts with its median.

On a CPU the clock is processor time on one thread, which other programs on the machine hardly disturb. On a GPU it is
CUDA events around whole steps; precision is bfloat16 under autocast over float32 weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
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
    made.add_argument("--mixes", nargs="+", default=["shuffled", "loose", "bucketed", "sorted"])
    made.add_argument("--fp8", nargs="*", default=[], choices=("gemm", "attention"), help="our encoder in FP8 too")
    made.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the config, as for training"
    )
    made.add_argument("--no-stock", action="store_true", help="without NeMo's encoder")
    made.add_argument("--no-step", action="store_true", help="without the pre-training step by part")
    made.add_argument("--out", type=Path, help="result file (default: results/train_step_<device>_<time>.json)")
    return made


class Encoders:
    """Implementations of one encoder step, made one after the other where memory is short."""

    def __init__(self, config: Any, device: Any):
        self.config, self.device = config, device

    def make(self, name: str) -> Callable[[Any, Any], None]:
        """``stock``, ``ours``, or ``ours, fp8 MODE``: a function that trains one step on (B, F, T) and (B,)."""
        import torch
        from omegaconf import OmegaConf
        from step_workload import our_encoder, stock_encoder

        from nemo_slam.training.optimizers import FastestAdamW

        config = self.config
        if "fp8" in name:
            config = OmegaConf.merge(config, {"model": {"conformer": {"fp8": name.split()[-1]}}})
        torch.manual_seed(0)
        module = (stock_encoder if name == "stock" else our_encoder)(config).to(self.device).train()
        # A gradient of zero each step: the update costs what it costs, and the weights stay.
        optimizer = FastestAdamW(module.parameters(), lr=0.0)

        def step(features: Any, lengths: Any) -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                out, _ = module(audio_signal=features, length=lengths)
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def timed(step: Callable[[], Any], device: Any) -> float:
    """Seconds of one call."""
    import torch

    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_cpu = time.process_time()
    step()
    return time.process_time() - begin_cpu


def compare(names: list[str], mixes: dict[str, list[Any]], encoders: Encoders, repeats: int) -> list[dict]:
    """One row for each mix and implementation."""
    import torch
    from step_flops import encoder as flops_of

    device = encoders.device
    together = device.type == "cpu"  # a GPU is ours alone, and its memory may not hold all
    rows = []
    for group in [names] if together else [[name] for name in names]:
        steps = {name: encoders.make(name) for name in group}
        for mix, batches in mixes.items():
            seconds: dict[str, list[float]] = {name: [] for name in group}
            peaks = dict.fromkeys(group, 0)
            for batch in batches:
                inputs = batch.features(device, encoders.config.model.speech_encoder.feat_in)
                samples: dict[str, list[float]] = {name: [] for name in group}
                for name, step in steps.items():
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    step(*inputs)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                        peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
                for _ in range(repeats):
                    for name, step in steps.items():
                        samples[name].append(timed(lambda s=step, i=inputs: s(*i), device))
                for name in group:
                    seconds[name].append(statistics.median(samples[name]))
            frames = sum(batch.total for batch in batches)
            work = 3 * sum(flops_of(batch.frames, encoders.config.model) for batch in batches)
            padding = 1 - frames / sum(len(b.frames) * int(b.frames.max()) for b in batches)
            for name in group:
                rows.append(
                    {
                        "mix": mix,
                        "implementation": name,
                        "padding_share": padding,
                        "batches": len(batches),
                        "frames": frames,
                        "seconds": sum(seconds[name]),
                        "frames_per_second": frames / sum(seconds[name]),
                        "flops_per_second": work / sum(seconds[name]),
                        "peak_bytes": peaks[name] or None,
                    }
                )
        steps.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


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
    stock = {row["mix"]: row["frames_per_second"] for row in result["encoders"] if row["implementation"] == "stock"}
    for row in result["encoders"]:
        line = f"  {row['mix']:9s} padding {row['padding_share']:5.1%}  {row['implementation']:20s}"
        line += f"{row['frames_per_second']:12,.0f} frames/s  {row['flops_per_second'] / peak:6.1%}"
        if row["peak_bytes"]:
            line += f"  {row['peak_bytes'] / 2**30:6.1f} GiB"
        if row["mix"] in stock:
            line += f"  {row['frames_per_second'] / stock[row['mix']]:.2f}x stock"
        print(line)
    for name, step in result["steps"].items():
        speed = f"{step['frames_per_second']:,.0f} frames/s, {step['tokens_per_second']:,.0f} tokens/s"
        print(f"  full step, {name}: {speed}, {step['flops_per_second'] / peak:.1%}")
        for part, seconds in step["parts_seconds"].items():
            print(f"    {part:20s}{seconds / step['seconds']:6.1%}  {1e3 * seconds / step['batches']:9.1f} ms a step")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    import torch
    from omegaconf import OmegaConf
    from step_workload import batches, our_encoder, resolved_config

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
    mixes = {mix: batches(mix, budget, options.batches) for mix in options.mixes}
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
        "encoders": compare(names, mixes, Encoders(config, device), options.repeats),
        "steps": {},
    }
    if not options.no_step:
        mix = "bucketed" if "bucketed" in mixes else options.mixes[-1]
        for mode in ("none", *options.fp8):
            changed = OmegaConf.merge(config, {"model": {"conformer": {"fp8": mode}}})
            result["steps"][f"{mix}, fp8 {mode}"] = full_step(changed, mixes[mix], device, options.repeats)
            gc.collect()
    show(result)
    kind = device.type if device.type == "cpu" else result["device"].replace(" ", "_")
    stamp = result["time"].replace(":", "").replace("+0000", "")
    out = options.out or RESULTS / f"train_step_{options.model}_{kind}_{stamp}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
