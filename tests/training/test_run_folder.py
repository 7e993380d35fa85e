"""metrics.csv survives kills, resumes and new columns; the accumulator's averages are those of all examples."""

import csv
import logging
import logging.handlers
import math
from types import SimpleNamespace

import pytest
import torch

from nemo_slam.objectives.base import Histogram, Loss, Metric, ObjectiveOutput
from nemo_slam.objectives.metrics import MetricAccumulator
from nemo_slam.training import run_folder
from nemo_slam.training.run_folder import MetricsFile, RunMetrics, stop_keeping_log_lines


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_and_columns_may_come_later(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.open_at(0)
    file.append({"step": 10, "loss": 3.0})
    file.append({"step": 20, "loss": 2.0})
    file.append({"step": 20, "val_loss": 2.5})
    rows = read(tmp_path / "metrics.csv")
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,loss,val_loss"
    assert [(r["step"], r["loss"], r["val_loss"]) for r in rows] == [
        ("10", "3.0", ""),
        ("20", "2.0", ""),
        ("20", "", "2.5"),
    ]


@pytest.mark.parametrize("torn", ["", "30,1.", "3"])
def test_a_resume_drops_later_rows_and_a_torn_line(tmp_path, torn):
    first = MetricsFile(tmp_path / "metrics.csv")
    first.open_at(0)
    for step in (10, 20, 30):
        first.append({"step": step, "loss": 1.0, "lr": 0.1})
    with first.path.open("a") as file:
        file.write(torn)
    second = MetricsFile(tmp_path / "metrics.csv")
    second.open_at(20)
    assert [row["step"] for row in read(second.path)] == ["10", "20"]
    second.append({"step": 30, "loss": 2.0, "lr": 0.1})
    assert [row["loss"] for row in read(second.path)] == ["1.0", "1.0", "2.0"]


def output(loss, count, histogram=None):
    total = torch.tensor(float(loss))
    return ObjectiveOutput(
        [Loss("codes", total, torch.tensor(float(count)), weight=0.5)],
        [Metric("accuracy", torch.tensor(3.0), torch.tensor(float(count)))],
        [] if histogram is None else [Histogram("code", torch.tensor(histogram), loss="codes")],
    )


def test_averages_weigh_every_example_alike():
    metrics = MetricAccumulator()
    metrics.update(output(30.0, 10, [3, 0, 1]), {"frames": 5.0})
    metrics.update(output(2.0, 2, [1, 3, 0]), {"frames": 7.0})
    figures = metrics.flush()
    assert figures["codes"] == pytest.approx(32 / 12)
    assert figures["loss"] == pytest.approx(0.5 * 32 / 12)
    assert figures["accuracy"] == pytest.approx(6 / 12)
    assert figures["frames"] == 12
    usage = [4 / 8, 3 / 8, 1 / 8]
    entropy = -sum(p * math.log(p) for p in usage)
    assert figures["code_perplexity"] == pytest.approx(math.exp(entropy))
    assert figures["code_information_gain"] == pytest.approx(entropy - 32 / 12)
    assert figures["code_top_share"] == 0.5
    assert metrics.flush() == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_hidden(value):
    metrics = MetricAccumulator()
    metrics.update(output(30.0, 10), {})
    metrics.update(output(value, 2), {})
    assert str(metrics.flush()["loss"]) == str(value)


def test_a_loss_without_examples_is_not_a_number_and_not_in_the_sum():
    metrics = MetricAccumulator()
    metrics.update(output(0.0, 0), {})
    figures = metrics.flush()
    assert math.isnan(figures["codes"])
    assert figures["loss"] == 0.0


def test_a_validation_between_two_rows_is_no_training_time(tmp_path, monkeypatch):
    """Nor does the time before it get lost: steps of 10 s, a validation of 100 s after the second of four."""
    clock = [0.0]
    monkeypatch.setattr(run_folder.time, "perf_counter", lambda: clock[0])
    figures = dict.fromkeys(("loss", "positions", "attended_positions", "tokens"), 1.0) | {"frames": 4000.0}
    model = SimpleNamespace(
        train_metrics=SimpleNamespace(flush=lambda: dict(figures)), last_validation={"val_loss": 1.0}
    )
    trainer = SimpleNamespace(
        global_step=0,
        is_global_zero=True,
        max_steps=4,
        accumulate_grad_batches=1,
        loggers=[],
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
    )
    metrics = RunMetrics(tmp_path, 4)
    metrics.on_train_start(trainer, model)
    for batch in range(4):
        clock[0] += 10
        trainer.global_step += 1
        metrics.on_train_batch_end(trainer, model, None, None, batch)
        if trainer.global_step == 2:
            metrics.on_validation_start(trainer, model)
            clock[0] += 100
            metrics.on_validation_end(trainer, model)
    training = read(tmp_path / "metrics.csv")[-1]
    assert (float(training["seconds"]), float(training["frames_per_second"])) == (40.0, 100.0)


def test_the_progress_line_has_losses_and_rates():
    figures = {
        "loss": 3.25,
        "masked_speech/contrastive": 2.5,
        "masked_text/tokens": math.nan,  # no text in the interval
        "lr": 1e-3,
        "frames_per_second": 4000.0,
        "tokens_per_second": 612.4,
    }
    line = RunMetrics._line(20, 500, figures)
    assert line == "step 20/500: loss 3.250, speech/contrastive 2.500, 40 s of speech/s, 612 tokens/s"
    assert "loss nan" in RunMetrics._line(21, 500, {**figures, "loss": math.nan})


def test_log_lines_are_not_kept_for_the_length_of_the_run(monkeypatch):
    """A line each few steps, and a run has a million."""
    memory = logging.handlers.MemoryHandler(-1)  # as NeMo's Logger has it
    nemo = logging.getLogger("nemo_logger")
    monkeypatch.setattr(nemo, "handlers", [*nemo.handlers, memory])
    nemo.warning("before")
    assert len(memory.buffer) == 1
    stop_keeping_log_lines()
    assert memory.buffer == []
    nemo.warning("after")
    assert memory.buffer == []


def test_ranks_that_say_nothing_go_on_saying_nothing(monkeypatch, capsys):
    """NeMo gives ranks above 0 no other handler, and Python writes warnings of a logger that has none to stderr."""
    nemo = logging.getLogger("nemo_logger")
    monkeypatch.setattr(nemo, "handlers", [logging.handlers.MemoryHandler(-1)])
    stop_keeping_log_lines()
    nemo.warning("of rank 1")
    assert capsys.readouterr().err == ""
