"""Encoder steps of ``train_step.py``: ours and NeMo's, made, timed and compared on the same batches."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any


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
        with torch.device(self.device):  # 600 million random numbers take a CPU seconds
            module = (stock_encoder if name == "stock" else our_encoder)(config)
        module = module.to(self.device).train()
        # A gradient of zero each step: the update costs what it costs, and the weights stay.
        optimizer = FastestAdamW(module.parameters(), lr=0.0)

        def step(features: Any, lengths: Any) -> None:
            try:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                    out, _ = module(audio_signal=features, length=lengths)
                # Both end in a LayerNorm, to whose input a sum of squares has no gradient: products of noise and zeros
                # take less power, and so less time, than a training step's.
                out.float().pow(3).mean().backward()
                optimizer.step()
            finally:
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


def compare(
    names: list[str], mixes: dict[str, list[Any]], encoders: Encoders, repeats: int, add: Callable[[dict], None]
) -> None:
    """Hands one row for each mix and implementation to ``add``."""
    from step_workload import forget_scales

    together = encoders.device.type == "cpu"  # a GPU is ours alone, and its memory may not hold all
    for group in [names] if together else [[name] for name in names]:
        compare_group(group, mixes, encoders, repeats, add)
        release(encoders.device)
        forget_scales()


def compare_group(
    group: list[str], mixes: dict[str, list[Any]], encoders: Encoders, repeats: int, add: Callable[[dict], None]
) -> None:
    """:func:`compare` of implementations that are in memory together; nothing holds them afterwards."""
    import torch
    from step_flops import encoder as flops_of

    device = encoders.device
    steps = {name: encoders.make(name) for name in group}
    for mix, batches in mixes.items():
        seconds: dict[str, list[float]] = {name: [] for name in group}
        peaks = dict.fromkeys(group, 0)
        running = dict(steps)
        for batch in batches:
            inputs = batch.features(device, encoders.config.model.speech_encoder.feat_in)
            samples: dict[str, list[float]] = {name: [] for name in group}
            for name, step in list(running.items()):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                try:
                    step(*inputs)
                except torch.cuda.OutOfMemoryError:
                    del running[name]
                    continue
                if device.type == "cuda":
                    torch.cuda.synchronize()
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
            for _ in range(repeats):
                for name, step in running.items():
                    samples[name].append(timed(lambda s=step, i=inputs: s(*i), device))
            for name in running:
                seconds[name].append(statistics.median(samples[name]))
        frames = sum(batch.total for batch in batches)
        work = 3 * sum(flops_of(batch.frames, encoders.config.model) for batch in batches)
        padding = 1 - frames / sum(len(b.frames) * int(b.frames.max()) for b in batches)
        for name in group:
            row = {"mix": mix, "implementation": name, "padding_share": padding, "batches": len(batches)}
            row["frames"] = frames
            if name in running:
                row["seconds"] = sum(seconds[name])
                row["frames_per_second"] = frames / row["seconds"]
                row["flops_per_second"] = work / row["seconds"]
                row["peak_bytes"] = peaks[name] or None
            else:
                row["error"] = "out of memory"
            add(row)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def release(device: Any) -> None:
    """Give the memory of what is no longer used back."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
