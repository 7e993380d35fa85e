"""Rates of each group against values worked out by hand."""

import math

import pytest
import torch

from nemo_slam.finetuning.schedule import FreezeEncoder, GroupedWarmup


def rates(steps, groups, **options):
    """(steps, groups) learning rates that the optimizer uses at each step."""
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in groups]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    schedule = GroupedWarmup(optimizer, **options)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return torch.tensor(seen, dtype=torch.float64).T


def test_groups_have_their_own_peak_warmup_and_start():
    groups = [{"lr": 3.0, "warmup_steps": 3, "frozen_steps": 4}, {"lr": 1.0}]
    slow, fast = rates(12, groups, warmup_steps=1, decay="constant")
    torch.testing.assert_close(slow, torch.tensor([0, 0, 0, 0, 0.75, 1.5, 2.25, 3, 3, 3, 3, 3], dtype=torch.float64))
    torch.testing.assert_close(fast, torch.tensor([0.5] + [1.0] * 11, dtype=torch.float64))


def test_inverse_square_root_meets_the_peak_and_halves_at_four_times_the_steps():
    (rate,) = rates(40, [{"lr": 2.0}], warmup_steps=9)
    assert rate.argmax() == 9
    assert rate[9] == 2.0
    assert rate[39] == pytest.approx(1.0)


def test_cosine_ends_at_the_floor():
    (rate,) = rates(22, [{"lr": 1.0}], warmup_steps=0, decay="cosine", max_steps=20, min_lr=0.1)
    assert rate[0] == 1.0
    assert rate[10] == pytest.approx(0.55)
    assert rate[5] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rate[20] == rate[21] == pytest.approx(0.1)


def test_unknown_decay_is_named():
    with pytest.raises(ValueError, match="decay: 'linear' is not one of inverse_square_root, cosine, constant"):
        rates(1, [{"lr": 1.0}], decay="linear")


def test_frozen_encoder_stays_bitwise_and_then_moves():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)

    class FakeTrainer:
        global_step = 0

    torch.manual_seed(0)
    model, trainer, freeze = Model(), FakeTrainer(), FreezeEncoder(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    start = model.encoder.weight.detach().clone()
    for step in range(3):
        trainer.global_step = step
        optimizer.zero_grad()
        model.decoder(model.encoder(torch.ones(2, 3))).sum().backward()
        freeze.on_before_optimizer_step(trainer, model, optimizer)
        optimizer.step()
        assert torch.equal(model.encoder.weight, start) == (step < 2)
