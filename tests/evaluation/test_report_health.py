"""The rules of the report's health table, each on both sides of its limits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from report_helpers import CODES, write_run

from nemo_slam.evaluation.report import health
from nemo_slam.evaluation.report.runs import Run, Series, read_run

WIDTH = 200


def run_of(steps: int = 100, max_steps: int = 100, skipped=(), **columns: list[float]) -> Run:
    """A run with these figures at validation, or in training where the name begins with ``train_``."""
    parts: dict[str, dict[str, Series]] = {"training": {}, "validation": {}}
    for name, values in columns.items():
        part = "training" if name.startswith("train_") else "validation"
        at = tuple(range(steps // len(values), steps + 1, steps // len(values)))[: len(values)]
        parts[part][name.removeprefix("train_").replace("__", "/")] = Series(at, tuple(values))
    model = {"objectives": {}, "conformer": {"d_model": WIDTH}, "quantizer": {"num_codes": CODES}}
    config = {"model": model, "trainer": {"max_steps": max_steps}}
    return Run(Path("run"), "run", parts["training"], parts["validation"], config, list(skipped))


def colour(check, run: Run) -> str | None:
    return check(run).colour


@pytest.mark.parametrize(
    ("losses", "expected"), [([3.0, 2.0], "green"), ([3.0, math.nan], "red"), ([math.inf, 2.0], "red")]
)
def test_finite_losses(losses, expected):
    assert colour(health.finite_losses, run_of(train_loss=losses)) == expected
    assert colour(health.finite_losses, run_of(loss=losses)) == expected


@pytest.mark.parametrize(("skipped", "expected"), [(0, "green"), (1, "amber"), (2, "red")])
def test_skipped_updates(skipped, expected):
    assert colour(health.skipped_updates, run_of(train_loss=[1.0], train_skipped_steps=[0, skipped])) == expected


def test_the_last_skipped_update_is_named():
    rows = [{"step": 7, "reason": "the loss is not finite"}]
    verdict = health.skipped_updates(run_of(train_loss=[1.0], skipped=rows))
    assert verdict.colour == "amber"
    assert "step 7, the loss is not finite" in verdict.note


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([9, 8, 7, 6, 5], "green"), ([9, 5, 5, 5, 5.4], "green"), ([9, 5, 5, 5, 5.6], "amber"), ([5, 4, 4, 4, 6], "red")],
)
def test_falling_loss(losses, expected):
    assert colour(health.falling_loss, run_of(loss=losses)) == expected
    assert colour(health.falling_loss, run_of(train_loss=losses, loss=[1.0, 2.0])) == expected  # too few validations


@pytest.mark.parametrize(("perplexity", "expected"), [(3.1, "red"), (3.3, "amber"), (7.9, "amber"), (8.1, "green")])
def test_code_perplexity(perplexity, expected):
    """Limits at 10% and 25% of 32 codes."""
    assert colour(health.code_perplexity, run_of(masked_speech__code_perplexity=[30.0, perplexity])) == expected
    assert colour(health.code_perplexity, run_of(translation_lm__code_perplexity=[perplexity])) == expected


@pytest.mark.parametrize(
    ("gain", "steps", "expected"),
    [
        (0.0, 2000, "red"),
        (0.0, 999, "amber"),
        (0.0, 1900, "amber"),
        (-0.3, 2100, "red"),
        (0.05, 2000, "amber"),
        (0.05, 20, "amber"),
        (0.2, 20, "green"),
    ],
)
def test_information_gain(gain, steps, expected):
    """Planned are 4,000 steps, but for the run of 999, which has ended."""
    figures = {"masked_speech__code_perplexity": [9.0], "masked_speech__code_information_gain": [gain]}
    assert colour(health.information_gain, run_of(steps, 999 if steps == 999 else 4000, **figures)) == expected


@pytest.mark.parametrize(("rank", "expected"), [(3.9, "red"), (9.9, "amber"), (10.1, "green")])
def test_effective_rank(rank, expected):
    assert colour(health.effective_rank, run_of(probe__effective_rank=[rank])) == expected


@pytest.mark.parametrize(("given", "expected"), [(0.30, "green"), (0.26, "amber"), (0.1, "amber")])
def test_cross_modal_gain(given, expected):
    run = run_of(
        probe__text_given_speech=[given], probe__text_given_other_speech=[0.2], probe__text_without_speech=[0.25]
    )
    assert colour(health.cross_modal_gain, run) == expected


@pytest.mark.parametrize(("found", "expected"), [(0.10, "green"), (0.09, "amber"), (0.02, "amber")])
def test_retrieval(found, expected):
    run = run_of(probe__retrieval_at_1=[found], probe__retrieval_at_1_chance=[0.05])
    assert colour(health.retrieval, run) == expected


@pytest.mark.parametrize(("wer", "expected"), [(0.3, "green"), (0.5, "amber"), (0.98, "red")])
def test_word_errors(wer, expected):
    assert colour(health.word_errors, run_of(wer=[wer])) == expected


@pytest.mark.parametrize(("last", "expected"), [(80.0, "green"), (70.0, "amber")])
def test_steady_speed(last, expected):
    run = run_of(train_frames_per_second=[100.0] * 8 + [last] * 2)
    assert colour(health.steady_speed, run) == expected


def test_speed_of_a_run_on_text_alone_is_that_of_its_tokens():
    """Pre-training logs both; the speech of such a run is 0."""
    tokens = [100.0] * 8 + [70.0] * 2
    for others in ({"train_frames_per_second": [0.0] * 10}, {}):
        verdict = health.steady_speed(run_of(train_tokens_per_second=tokens, **others))
        assert (verdict.colour, verdict.value) == ("amber", "70% of its median")
    assert colour(health.steady_speed, run_of(train_frames_per_second=[0.0] * 10)) is None


def test_a_run_without_a_figure_gets_no_verdict():
    verdicts = health.judge(run_of()).verdicts
    assert {verdict.colour for verdict in verdicts} == {None}
    assert all(verdict.note for verdict in verdicts)
    assert health.judge(run_of()).colour == "amber"  # nothing known is not healthy
    assert health.judge(run_of()).summary == "nothing logged yet to judge"


def test_a_run_of_one_step_is_not_called_healthy():
    assert health.judge(run_of(train_loss=[3.0])).summary == "nothing wrong so far: too few losses to say more"
    assert health.judge(run_of(train_loss=[3.0, 2.0, 1.0])).summary == "healthy"


def test_a_collapsed_and_a_healthy_run(tmp_path):
    good = health.judge(read_run(write_run(tmp_path / "good", 20.0, 0.8)))
    assert (good.colour, good.summary) == ("green", "healthy")
    collapsed = health.judge(read_run(write_run(tmp_path / "collapsed", 1.5, 0.0, loss=2.0)))
    assert collapsed.colour == "red"
    assert collapsed.summary == "not healthy: few codes in use; predicted codes no better than their histogram"
    noise = health.judge(read_run(write_run(tmp_path / "noise", float(CODES), 0.0)))
    assert noise.summary == "not healthy: predicted codes no better than their histogram"
    skipped = health.judge(read_run(write_run(tmp_path / "skipped", 20.0, 0.8, skipped=1)))
    assert skipped.summary == "nothing broken, but look at: skipped updates"
