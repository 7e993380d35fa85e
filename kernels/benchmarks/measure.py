"""Timing, memory and copy bandwidth; on a GPU by CUDA events with a cold L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measurement:
    """Median and spread in milliseconds, and the most memory held beyond the inputs, in bytes (0 on a CPU)."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    peak_bytes: int
    runs: int


class Meter:
    """Times functions on one device."""

    def __init__(self, device: torch.device, seconds: float = 0.5):
        self.device = device
        self.seconds = seconds
        size = 256 * 2**20 if device.type == "cuda" else 2**10
        # Written between runs, so that no run finds its inputs in the L2 cache (50 MB on an H100).
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def _once(self, function: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            function()
            return (time.perf_counter() - begin) * 1e3
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def time(self, function: Callable[[], object]) -> Measurement:
        """Warms up (which compiles), then repeats for about ``seconds``, at least 5 times."""
        for _ in range(3):
            function()
        peak = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        times = [self._once(function) for _ in range(5)]
        wanted = min(int(self.seconds * 1e3 / max(statistics.median(times), 1e-3)), 500)
        times += [self._once(function) for _ in range(wanted - 5)]
        return Measurement(statistics.median(times), min(times), max(times), peak, len(times))

    def copy_bandwidth(self, size: int) -> float:
        """Bytes per second, read plus written, of a copy of ``size`` bytes."""
        source = torch.zeros(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / (self.time(lambda: target.copy_(source)).median_ms * 1e-3)
