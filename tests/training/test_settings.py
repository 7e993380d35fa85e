"""What an optimizer takes from the config after a resume, without a trainer; with one it is in test_resume.py."""

from types import SimpleNamespace

import pytest
import torch

from nemo_slam.training.settings import ConfiguredSettings


def adamw(**options):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    return torch.optim.AdamW([parameter], **options)


@pytest.mark.parametrize(("before", "now"), [(True, None), (None, True)])
def test_a_run_that_changes_between_cpu_and_gpu_computes_as_its_state_lies(before, now):
    """torch's fused AdamW counts steps on the GPU, and torch restores the count by the saved group, not by the new."""
    saved = adamw(lr=0.1, weight_decay=0.2, betas=(0.5, 0.6), fused=before)
    saved.step()
    optimizer = adamw(lr=0.3, weight_decay=0.4, betas=(0.7, 0.8), fused=now)
    trainer = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[])
    settings = ConfiguredSettings()
    settings.on_fit_start(trainer, None)
    optimizer.load_state_dict(saved.state_dict())
    settings.on_train_start(trainer, None)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.3, 0.4, (0.7, 0.8))
    assert group["fused"] is before
