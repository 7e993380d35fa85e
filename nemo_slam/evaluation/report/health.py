"""Is a run healthy? A few rules over its figures, each in the words that the report prints beside its verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from nemo_slam.evaluation.report.runs import Run

GREEN, AMBER, RED = "green", "amber", "red"
ORDER = (GREEN, AMBER, RED)
EARLY = 1000
"""Steps before which codes that are not learnt yet are no reason to worry."""
RECENT = 0.2
"""Share of the logged values, at the end, whose median is judged: one odd value decides nothing."""


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    colour: green, amber or red; None where the run has no such figure.
    value: the figure, for people.
    note: what it means for this run, or why there is no verdict.
    """

    colour: str | None
    value: str
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A rule: its title, what a run is said to be that fails it, its statement, and the function that applies it."""

    title: str
    concern: str
    rule: str
    apply: Callable[[Run], Verdict]


def recent(run: Run, name: str) -> float | None:
    """Median of the last fifth of a figure, validation preferred; None where there is none."""
    series = run.figure(name)
    values = [] if series is None else [value for value in series.tail(RECENT) if not math.isnan(value)]
    return statistics.median(values) if values else None


def speech_objective(run: Run) -> str | None:
    """The objective whose codes are judged: masked speech, or translation_lm where that alone masks speech."""
    names = ("masked_speech", "translation_lm")
    return next((name for name in names if run.figure(f"{name}/code_perplexity") is not None), None)


def num_codes(run: Run) -> int | None:
    for quantizer in ("random_projection", "quantizer"):
        value = run.setting(f"model.{quantizer}.num_codes")
        if value is not None:
            return int(value)
    return None


def progress(run: Run) -> float:
    """Share of the planned steps that are done; 1 where the plan is not known."""
    return min(1.0, run.last_step / run.max_steps) if run.max_steps and run.max_steps > 0 else 1.0


def _absent(why: str) -> Verdict:
    return Verdict(None, "–", why)


def _three(value: float, red: float, amber: float) -> str:
    """Red below ``red``, amber below ``amber``."""
    return RED if value < red else AMBER if value < amber else GREEN


def finite_losses(run: Run) -> Verdict:
    bad = []
    for where, columns in (("training", run.training), ("validation", run.validation)):
        series = columns.get("loss")
        if series is not None:
            bad += [(step, where) for step, v in zip(series.steps, series.values, strict=True) if not math.isfinite(v)]
    if bad:
        return Verdict(RED, f"{len(bad)} not finite", f"first at step {min(bad)[0]} ({min(bad)[1]})")
    total = sum(len(columns["loss"].values) for columns in (run.training, run.validation) if "loss" in columns)
    return Verdict(GREEN, f"all {total} finite") if total else _absent("no loss was logged")


def skipped_updates(run: Run) -> Verdict:
    series = run.training.get("skipped_steps")
    if series is None and not run.skipped:
        return _absent("no guard in this run")
    count = max(sum(series.values) if series else 0, len(run.skipped))
    share = count / max(run.last_step, 1)
    last = f"; last: step {run.skipped[-1]['step']}, {run.skipped[-1]['reason']}" if run.skipped else ""
    colour = GREEN if count == 0 else AMBER if share <= 0.01 else RED
    return Verdict(colour, f"{count:.0f} of {run.last_step:,}", f"{share:.1%} of all updates{last}" if count else "")


def falling_loss(run: Run) -> Verdict:
    """Judged on the validation's losses where there are three or more of them."""
    validation = run.validation.get("loss")
    enough = validation is not None and len(validation.values) >= 3
    series = validation if enough else run.training.get("loss")
    if series is None or len(series.values) < 3:
        return _absent("fewer than three values so far")
    first, last = statistics.median(series.head(RECENT)), statistics.median(series.tail(RECENT))
    best = min(value for value in series.values if not math.isnan(value)) if is_number(first, last) else math.nan
    where = "validation" if enough else "training"
    if not is_number(first, last):
        return Verdict(RED, "not a number", where)
    colour = RED if last > first else AMBER if last > best + 0.1 * abs(best) else GREEN
    return Verdict(colour, f"{first:.2f} → {last:.2f}", f"{where}, best {best:.2f}")


def is_number(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def code_perplexity(run: Run) -> Verdict:
    name, codes = speech_objective(run), num_codes(run)
    value = None if name is None else recent(run, f"{name}/code_perplexity")
    if value is None or codes is None:
        return _absent("no objective of this run predicts codes")
    top = recent(run, f"{name}/code_top_share")
    note = "" if top is None else f"the commonest code is {top:.0%} of all targets"
    return Verdict(_three(value / codes, 0.1, 0.25), f"{value:.1f} of {codes}", note)


def information_gain(run: Run) -> Verdict:
    name = speech_objective(run)
    value = None if name is None else recent(run, f"{name}/code_information_gain")
    if value is None:
        return _absent("no objective of this run predicts codes")
    colour = _three(value, 0.02, 0.1)
    early = colour == RED and (progress(run) < 0.5 or run.last_step < EARLY)
    return Verdict(AMBER if early else colour, f"{value:+.3f} nats", "early: codes come late" if early else "")


def effective_rank(run: Run) -> Verdict:
    value, width = recent(run, "probe/effective_rank"), run.setting("model.conformer.d_model")
    if value is None or not width:
        return _absent("measured at validation with probes: true, on pairs")
    return Verdict(_three(value, max(2.0, 0.02 * width), max(4.0, 0.05 * width)), f"{value:.1f} of {width}")


def cross_modal_gain(run: Run) -> Verdict:
    given = recent(run, "probe/text_given_speech")
    other, without = recent(run, "probe/text_given_other_speech"), recent(run, "probe/text_without_speech")
    if given is None or other is None or without is None:
        return _absent("needs translation_lm and probes")
    gain = 100 * (given - max(other, without))
    note = f"{given:.1%} with its speech, {other:.1%} with other speech, {without:.1%} without"
    return Verdict(GREEN if gain >= 2 else AMBER, f"{gain:+.1f} points", note)


def retrieval(run: Run) -> Verdict:
    found, chance = recent(run, "probe/retrieval_at_1"), recent(run, "probe/retrieval_at_1_chance")
    if found is None or not chance:
        return _absent("needs matching and probes")
    return Verdict(
        GREEN if found >= 2 * chance else AMBER, f"{found / chance:.1f} x chance", f"{found:.1%}, chance {chance:.1%}"
    )


def word_errors(run: Run) -> Verdict:
    value = recent(run, "wer")
    if value is None:
        return _absent("no fine-tuned recogniser")
    return Verdict(RED if value >= 0.98 else AMBER if value >= 0.5 else GREEN, f"{value:.1%}")


def steady_speed(run: Run) -> Verdict:
    # A run on text alone logs speech too: 0 of it.
    names = ("frames_per_second", "speech_per_second", "tokens_per_second")
    found = (run.training.get(name) for name in names)
    series = next((each for each in found if each is not None and any(each.values)), None)
    if series is None or len(series.values) < 5:
        return _absent("fewer than five logged intervals")
    usual, last = statistics.median(series.values), statistics.median(series.tail(RECENT))
    share = last / usual if usual else 0.0
    return Verdict(GREEN if share >= 0.75 else AMBER, f"{share:.0%} of its median")


CHECKS = (
    Check("Losses are numbers", "losses that are no numbers", "red: any total loss is NaN or infinite", finite_losses),
    Check(
        "Updates skipped", "skipped updates", "green: none; amber: up to 1% of the steps; red: more", skipped_updates
    ),
    Check(
        "Loss falls",
        "the loss does not fall",
        "red: the last fifth of the values lies above the first; amber: more than 10% above the best. A collapsed "
        "run's losses fall too: see the next two",
        falling_loss,
    ),
    Check(
        "Code perplexity",
        "few codes in use",
        "red: below 10% of the codebook (collapse); amber: below 25%",
        code_perplexity,
    ),
    Check(
        "Code information gain",
        "predicted codes no better than their histogram",
        "entropy of the code histogram minus the cross entropy of masked codes. Red: below 0.02 nats, the model knows "
        "no more than the histogram (amber in the first half of the run and before step 1,000); amber: below 0.1",
        information_gain,
    ),
    Check(
        "Effective rank",
        "outputs that are all alike",
        "of the encoder's output on speech. Red: below 2% of its width; amber: below 5%",
        effective_rank,
    ),
    Check(
        "Speech helps text",
        "speech does not help with text",
        "accuracy on masked tokens with the true speech, minus the better of other and no speech. Green: 2 points or "
        "more",
        cross_modal_gain,
    ),
    Check(
        "Retrieval of the text",
        "retrieval near chance",
        "the true text ranks first. Green: twice as often as by chance, or more",
        retrieval,
    ),
    Check("Word error rate", "many word errors", "validation. Red: 98% or more; amber: 50% or more", word_errors),
    Check("Steady speed", "slowing down", "amber: the last fifth is below 75% of the run's median", steady_speed),
)


@dataclass(frozen=True)
class Health:
    """All verdicts of a run, in the order of ``CHECKS``, and the worst of them."""

    verdicts: tuple[Verdict, ...]

    @property
    def colour(self) -> str:
        return max((v.colour for v in self.verdicts if v.colour is not None), key=ORDER.index, default=AMBER)

    @property
    def summary(self) -> str:
        """The verdict in words, with what decides it."""
        found = dict(zip((check.apply for check in CHECKS), self.verdicts, strict=True))
        concerns = [c.concern for c in CHECKS if found[c.apply].colour == self.colour]
        if all(verdict.colour is None for verdict in self.verdicts):
            return "nothing logged yet to judge"
        if self.colour == GREEN:
            return "healthy" if found[falling_loss].colour else "nothing wrong so far: too few losses to say more"
        return f"{'not healthy' if self.colour == RED else 'nothing broken, but look at'}: {'; '.join(concerns)}"


def judge(run: Run) -> Health:
    """Apply every check."""
    return Health(tuple(check.apply(run) for check in CHECKS))


def shown_checks(healths: list[Health]) -> list[int]:
    """Places in ``CHECKS`` of those that at least one run has a verdict for."""
    return [i for i in range(len(CHECKS)) if any(health.verdicts[i].colour is not None for health in healths)]
