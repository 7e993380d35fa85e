"""Timing, memory and copy bandwidth; on a GPU by CUDA events with a cold L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measurement:
    """Median and spread in milliseconds; the most memory held beyond the inputs, in bytes (0 on a CPU).

    On a GPU the times are its own: the work is queued before it begins. ``call_ms`` is what the processor takes to
    queue it, which a training step hides behind earlier work as long as it is the shorter of the two.
    """

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    peak_bytes: int
    runs: int
    call_ms: float


class Meter:
    """Times functions on one device."""

    def __init__(self, device: torch.device, seconds: float = 0.5):
        self.device = device
        self.seconds = seconds
        size = 256 * 2**20 if device.type == "cuda" else 2**10
        # Written between runs, so that no run finds its inputs in the L2 cache (50 MB on an H100).
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def _once(self, function: Callable[[], object], head_start_ms: float = 0.0) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            function()
            return (time.perf_counter() - begin) * 1e3
        self._flush.zero_()
        # The GPU waits while the processor queues the work: else small kernels would be timed by their launches.
        torch.cuda._sleep(int(head_start_ms * 2e6))  # cycles, of at most 2 GHz
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
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        function()
        call = (time.perf_counter() - begin) * 1e3
        if cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        head_start = min(1.5 * call + 0.2, 20.0)
        begin = time.perf_counter()
        times = [self._once(function, head_start) for _ in range(5)]
        each = (time.perf_counter() - begin) / len(times)
        wanted = min(int(self.seconds / max(each, 1e-6)), 500)
        times += [self._once(function, head_start) for _ in range(wanted - 5)]
        return Measurement(statistics.median(times), min(times), max(times), peak, len(times), call)

    def copy_bandwidth(self, size: int) -> float:
        """Bytes per second, read plus written, of a copy of ``size`` bytes."""
        source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=self.device)  # zeros may copy faster
        target = torch.empty_like(source)
        return 2 * size / (self.time(lambda: target.copy_(source)).median_ms * 1e-3)
