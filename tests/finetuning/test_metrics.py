"""metrics.csv of fine-tuning: figures over all ranks and micro-batches."""

from types import SimpleNamespace

import pytest
import torch

from nemo_slam.finetuning.metrics import FineTuneMetrics


class TwoRanks:
    """A strategy whose other rank saw other sums."""

    other = torch.tensor([9.0, 2.0, 48000.0, 2.0], dtype=torch.float64)

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "sum"
        return tensor + self.other


@pytest.fixture
def model():
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(1, 1), "decoder": torch.nn.Linear(1, 1)})
    model.encoder = model["encoder"]
    return model


@pytest.fixture
def trainer(model):
    groups = [
        {"params": list(model["encoder"].parameters()), "lr": 0.1},
        {"params": [*model["decoder"].parameters()], "lr": 0.5},
    ]
    return SimpleNamespace(
        strategy=TwoRanks(),
        optimizers=[SimpleNamespace(param_groups=groups)],
        accumulate_grad_batches=2,
        global_step=1,
        max_steps=9,
        loggers=[],
        is_global_zero=True,
    )


def test_losses_and_speed_are_those_of_all_ranks(model, trainer, tmp_path):
    metrics = FineTuneMetrics(tmp_path, 1, ("speech_per_second", 1 / 16000))
    metrics.on_train_start(trainer, model)
    trainer.global_step = 2
    for number, loss in enumerate((2.0, 4.0)):  # of the micro-batches, before Lightning divides them
        batch = (None, torch.tensor([16000, 8000]))
        metrics.on_train_batch_end(trainer, model, {"loss": torch.tensor(loss / 2)}, batch, number)
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(values["loss"]) == pytest.approx((2 + 4 + 9) / 4)
    assert float(values["lr_encoder"]) == 0.1
    assert float(values["lr"]) == 0.5
    seconds = float(values["seconds"])
    assert float(values["speech_per_second"]) == pytest.approx((3.0 + 3.0) / seconds, rel=1e-4)


def run(metrics, trainer, model, *rows):
    """Rows of micro-batches with these losses, a step each."""
    for losses in rows:
        trainer.accumulate_grad_batches = len(losses)
        trainer.global_step += 1
        for number, loss in enumerate(losses):
            outputs = {"loss": torch.tensor(loss / len(losses))}
            metrics.on_train_batch_end(trainer, model, outputs, (None, torch.tensor([5])), number)


def test_a_loss_that_stays_nan_ends_the_run_while_good_checkpoints_are_left(model, trainer, tmp_path):
    """The checkpoint of the last finite loss holds the update that this loss led to: it is not to be trusted."""
    trainer.strategy.reduce = lambda tensor, reduce_op: tensor
    metrics = FineTuneMetrics(tmp_path, 1, ("tokens_per_second", 1.0))
    metrics.on_train_start(trainer, model)
    nan, inf = float("nan"), float("inf")
    run(metrics, trainer, model, [1.0, 1.0], [nan, nan], [1.0, 1.0], [1.0, nan], [inf, inf])
    with pytest.raises(RuntimeError, match=r"step 7: the training loss is nan .*checkpoints from step 4 on, "):
        run(metrics, trainer, model, [nan, nan])


def test_a_loss_that_is_nan_now_and_then_does_not_end_the_run(model, trainer, tmp_path):
    """model.skip_nan_grad leaves such updates out, and the weights stay as they are."""
    metrics = FineTuneMetrics(tmp_path, 1, ("tokens_per_second", 1.0))  # the other rank's losses are finite
    metrics.on_train_start(trainer, model)
    run(metrics, trainer, model, *[[float("nan")]] * 5)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 6
