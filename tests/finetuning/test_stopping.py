"""Early stopping, without a trainer; with one it is in test_finetune.py."""

import math
from types import SimpleNamespace

import pytest
import torch

from nemo_slam.finetuning.stopping import EarlyStopping


def validate(callback, values, module):
    """Validations that log these values, one a step; returns the steps after which training was to stop."""
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=True, should_stop=False, global_step=0)
    stops = []
    for step, value in enumerate(values, 1):
        trainer.global_step, trainer.callback_metrics = step, {"val_wer": torch.tensor(value)}
        module.bias.data.fill_(step)
        callback.on_validation_end(trainer, module)
        if trainer.should_stop:
            stops.append(step)
    return stops


@pytest.fixture
def module():
    layer = torch.nn.Linear(1, 1)
    layer.trainer = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda: None))
    return layer


@pytest.mark.parametrize(("mode", "values"), [("min", [3.0, 1.0, math.nan, 1.0, 2.0]), ("max", [1.0, 3.0, 3.0, 2.0])])
def test_it_stops_after_patience_and_the_best_come_back(tmp_path, module, mode, values):
    callback = EarlyStopping(tmp_path, 2, "val_wer", mode)
    assert validate(callback, values, module)[0] == 4
    assert callback.restore_best(module) == 2
    assert module.bias.item() == 2


def test_a_figure_that_is_never_a_number_leaves_the_last_weights(tmp_path, module):
    callback = EarlyStopping(tmp_path, 2, "val_wer", "min")
    assert validate(callback, [math.nan, math.nan], module) == [2]
    assert callback.restore_best(module) == -1
    assert module.bias.item() == 2


@pytest.mark.parametrize(("waited", "before"), [(0, False), (0, True), (2, False)])
def test_a_run_that_something_else_has_stopped_stays_so(tmp_path, module, waited, before):
    """As by trainer.max_time, which counts over all starts of a run."""
    callback = EarlyStopping(tmp_path, 2, "val_wer", "min")
    callback.load_state_dict({"best": 1.0, "best_step": 7, "waited": waited})
    trainer = SimpleNamespace(should_stop=before)
    callback.on_train_start(trainer, module)
    assert trainer.should_stop == (before or waited == 2)


def test_the_validation_of_a_run_that_is_out_of_time_does_not_count(tmp_path, module):
    callback = EarlyStopping(tmp_path, 2, "val_wer", "min")
    validate(callback, [1.0, 2.0], module)
    before = callback.state_dict()
    figures = {"val_wer": torch.tensor(3.0)}
    callback.on_validation_end(
        SimpleNamespace(sanity_checking=False, should_stop=True, global_step=3, callback_metrics=figures), module
    )
    assert callback.state_dict() == before


def test_a_full_disk_is_named(tmp_path, module, monkeypatch):
    def full(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"best\.pt\.part, .* MiB are left on its disk"):
        validate(EarlyStopping(tmp_path, 2, "val_wer", "min"), [1.0], module)


def test_other_ranks_wait_until_the_best_weights_are_written(tmp_path, module):
    """Rank 0 writes them after the last validation, while the others are out of the training loop already."""
    callback = EarlyStopping(tmp_path, 2, "val_wer", "min")
    callback.load_state_dict({"best": 1.0, "best_step": 7, "waited": 0})
    weights = {"weight": torch.zeros(1, 1), "bias": torch.full((1,), 7.0)}
    module.trainer.strategy.barrier = lambda: torch.save({"step": 7, "weights": weights}, callback.path)
    assert callback.restore_best(module) == 7
    assert module.bias.item() == 7
