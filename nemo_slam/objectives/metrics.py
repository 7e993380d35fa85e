"""Figures of a run: summed on the device over micro-batches and ranks, read once a logging interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nemo_slam.objectives.base import ObjectiveOutput, sum_over_ranks


class MetricAccumulator:
    """Sums (sum, count) pairs, histograms and what else a figure is taken of, until :meth:`flush`.

    ``loss`` is the weighted sum of the mean losses, each mean taken over the whole interval and all ranks. A loss
    without a single example is left out; one that is not a number is not.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._losses: dict[str, float] = {}
        self._histogram_losses: dict[str, str] = {}
        self._pooled: dict[str, Callable[[Tensor], float]] = {}

    def update(self, output: ObjectiveOutput, volume: Mapping[str, float]) -> None:
        """Add one micro-batch.

        Args:
            volume: how much went through the step (frames, tokens, positions, ...), summed as it is.
        """
        for item in [*output.losses, *output.metrics]:
            pair = torch.stack([item.total.detach().double(), item.count.detach().double()])
            self._add(f"mean:{item.name}", pair)
        for loss in output.losses:
            self._losses[loss.name] = loss.weight
        for histogram in output.histograms:
            self._add(f"histogram:{histogram.name}", histogram.counts.detach().double())
            self._histogram_losses[histogram.name] = histogram.loss
        for pooled in output.pooled:
            self._add(f"pooled:{pooled.name}", pooled.sums.detach().double())
            self._pooled[pooled.name] = pooled.figure
        for name, value in volume.items():
            self.add(name, value)

    def add(self, name: str, value: float) -> None:
        """Add to a figure that is summed over the interval and all ranks; every rank must add to the same names."""
        self._add(f"sum:{name}", torch.tensor(value, dtype=torch.float64))

    def _add(self, key: str, value: Tensor) -> None:
        self._sums[key] = value if key not in self._sums else self._sums[key] + value.to(self._sums[key].device)

    def flush(self) -> dict[str, float]:
        """All figures since the last call, over all ranks; every rank must call it."""
        if not self._sums:
            return {}
        keys = sorted(self._sums)
        device = next((v.device for v in self._sums.values() if v.device.type != "cpu"), torch.device("cpu"))
        flat = torch.cat([self._sums[key].to(device).flatten() for key in keys])
        parts = sum_over_ranks(flat).cpu().split([self._sums[key].numel() for key in keys])
        sums = dict(zip(keys, parts, strict=True))
        self._sums = {}

        figures: dict[str, float] = {}
        for key, value in sums.items():
            kind, name = key.split(":", 1)
            if kind == "mean":
                figures[name] = (value[0] / value[1]).item() if value[1] > 0 else math.nan
            elif kind == "sum":
                figures[name] = value.item()
            elif kind == "pooled":
                figures[name] = self._pooled[name](value)
        for key, value in sums.items():
            kind, name = key.split(":", 1)
            if kind == "histogram" and value.sum() > 0:
                usage = value / value.sum()
                entropy = -torch.special.xlogy(usage, usage).sum().item()
                figures[f"{name}_usage"] = (value > 0).double().mean().item()
                figures[f"{name}_perplexity"] = math.exp(entropy)
                figures[f"{name}_top_share"] = usage.max().item()
                figures[f"{name}_information_gain"] = entropy - figures[self._histogram_losses[name]]
        present = {name for name in self._losses if sums[f"mean:{name}"][1] > 0}
        figures["loss"] = sum(weight * figures[name] for name, weight in self._losses.items() if name in present)
        return figures
