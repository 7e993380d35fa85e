"""Time of a pre-training step by part, forward and backward, from marks between them."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

PARTS = ("data", "front end", "speech encoder", "re-padding", "multimodal encoder", "losses", "optimizer")
"""``re-padding`` is all between the others: planning and gathering packed rows, masking, embeddings, one projection."""


class Timeline:
    """Attributes the time since the last mark to a part."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.process_time()))

    def seconds(self) -> dict[str, float]:
        """Sums by part since the first mark, which only starts the clock; then forgets them."""
        totals: dict[str, float] = defaultdict(float)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            totals[part] += before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before
        self._marks.clear()
        return {part: totals[part] for part in PARTS}


class MeasuredStep:
    """Runs steps of a pre-training model with marks at the borders of its encoders.

    The backward runs in the order losses, multimodal encoder, packing, speech encoder, packing, front end.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, device: torch.device):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.timeline = Timeline(device)
        mark = self.timeline.mark
        encoders = (
            (model.speech_encoder.layers, "speech encoder", "re-padding"),
            (model.multimodal_encoder.layers, "multimodal encoder", "losses"),
        )
        for layers, name, before in encoders:
            layers.register_forward_pre_hook(lambda *_: mark("re-padding"))
            layers.register_forward_hook(lambda *_, n=name: mark(n))
            layers.register_full_backward_pre_hook(lambda *_, n=before: mark(n))
            layers.register_full_backward_hook(lambda *_, n=name: mark(n))
        model.speech_encoder.pre_encode.register_forward_hook(self._after_front_end)

    def _after_front_end(self, module: torch.nn.Module, inputs: Any, rows: torch.Tensor) -> None:
        self.timeline.mark("front end")
        if rows.requires_grad:
            rows.register_hook(lambda _: self.timeline.mark("re-padding"))

    def __call__(self, batch: Any) -> tuple[torch.Tensor, Any]:
        """One step on a batch that lies on the CPU. *Returns:* the loss, detached, and what the encoders gave."""
        mark = self.timeline.mark
        mark("start")
        batch = (batch.pin_memory() if self.device.type == "cuda" else batch).to(self.device, non_blocking=True)
        mark("data")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, _, outputs = self.model.losses(batch)
        mark("losses")
        loss.backward()
        mark("front end")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark("optimizer")
        return loss.detach(), outputs
