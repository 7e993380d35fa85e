"""What one of two processes of ``test_guards.py`` runs: the guard's hooks around a bad loss on one rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from nemo_slam.data.batch import StepBatch, TextBatch


def work(rank: int, folder: Path) -> None:
    from nemo_slam.objectives.metrics import MetricAccumulator
    from nemo_slam.training.guards import StepGuard

    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    guard = StepGuard(folder, max_consecutive=3, spike_factor=None, history=5)
    module = SimpleNamespace(train_metrics=MetricAccumulator())
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for step, bad_rank in enumerate([None, 1, 0]):
        trainer = SimpleNamespace(global_step=step, is_global_zero=rank == 0, accumulate_grad_batches=1)
        ids = torch.tensor([10 * rank + step])
        nothing = torch.zeros(0, dtype=torch.int64)
        batch = StepBatch(step, text=TextBatch(nothing, torch.zeros(1, dtype=torch.int64), ids, ids * 0 + step))
        guard.on_train_batch_start(trainer, module, batch, step)
        # Here the gradient stays finite whatever the loss says: the flag alone must reach the other rank.
        guard.on_before_backward(trainer, module, torch.tensor(float("nan") if bad_rank == rank else 1.0))
        weight.grad = torch.ones(3)
        guard.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
    figures = module.train_metrics.flush()
    torch.save((weight.detach(), guard.state_dict(), figures), folder / f"{rank}.pt")
    dist.destroy_process_group()
