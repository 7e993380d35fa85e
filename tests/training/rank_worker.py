"""What one process of ``test_ranks.py`` runs; a module of its own, so that a fresh process can import it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batch_helpers import exact_features, select
from torch import nn

STEPS = 5


class Step(nn.Module):
    """The losses of a batch as a forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch):
        total, self.result, _ = self.model.losses(batch)
        return total


def work(
    rank: int, world: int, configs: dict[str, Any], batch: Any, shares: list[dict[str, list[int]]], folder: Path
) -> None:
    """Trains each config on this rank's share, and writes what came of it to ``folder/WORLD_RANK.pt``, by config."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous_{world}", rank=rank, world_size=world)
    own = select(batch, shares[rank])
    torch.save({name: train(config, own, world) for name, config in configs.items()}, folder / f"{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def train(config: Any, own: Any, world: int) -> dict[str, Any]:
    """Five SGD steps: losses over all ranks, first gradients, weights, and this rank's counts."""
    from nemo_slam.models.pretraining import SLAMPretrainingModel
    from nemo_slam.objectives.base import sum_over_ranks

    torch.manual_seed(0)
    model = SLAMPretrainingModel(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.features = exact_features
    step = Step(model)
    if world > 1:
        step = nn.parallel.DistributedDataParallel(step)
    inner = step.module if world > 1 else step
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)

    losses, gradients, counts = [], {}, []
    for number in range(STEPS):
        optimizer.zero_grad()
        # Another epoch is another mask for each example, a function of the example wherever it lies.
        parts = {s: replace(p, epochs=torch.full_like(p.epochs, number)) for s, p in parts_of(own).items()}
        step(replace(own, **parts)).backward()
        counts.append({loss.name: loss.count.item() for loss in inner.result.losses})
        counts[-1] |= {f"{m.name} total": m.total.item() for m in inner.result.metrics}
        sums = sum_over_ranks(torch.stack([torch.stack([i.total, i.count.double()]) for i in inner.result.losses]))
        losses.append({i.name: (t / c).item() for i, (t, c) in zip(inner.result.losses, sums, strict=True)})
        if number == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "weights": weights, "counts": counts}


def parts_of(batch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in ("speech", "text", "pairs")}
