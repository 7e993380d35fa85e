"""The page that the ablations' numbers become, docs/ablations.md, and its pictures. All of it follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ablations_records import FIGURES, METRIC  # these two beside this file
from ablations_settings import BASE, UNTRAINED

from nemo_slam.evaluation.comparison import RESAMPLES, verdict
from nemo_slam.evaluation.report.figures import COLOURS, GREY, canvas, svg
from nemo_slam.evaluation.text_metrics import Interval

RECOGNITION, HELD_OUT = "ablations_recognition.svg", "ablations_held_out.svg"
UNCLEAR = "not clear"


def differences(found: Mapping[str, Any], arm: str) -> list[float]:
    """An arm's score less the base's, seed by seed."""
    return [a - b for a, b in zip(found["variants"][arm]["seeds"], found["variants"][BASE]["seeds"], strict=True)]


def judged(found: Mapping[str, Any], arm: str) -> str:
    """better or worse than base if the interval is clear of zero and every seed is on that side, else not clear."""
    difference = Interval(**found["variants"][arm]["difference"])
    how = verdict(METRIC, difference)
    agreed = all(seed * difference.value > 0 for seed in differences(found, arm))
    return how if how in ("better", "worse") and agreed else UNCLEAR


def compared(found: Mapping[str, Any]) -> list[str]:
    """The arms that have a difference from base."""
    return [arm for arm, row in found["variants"].items() if row["difference"] is not None]


def page(found: Mapping[str, Any]) -> str:
    """``docs/ablations.md``."""
    variants, seeds = found["variants"], found["seeds"]
    lines = [
        "# Ablations: what does each part do?",
        "",
        "Made by `make ablations` (`benchmarks/ablations.py`); the numbers are in `benchmarks/results/ablations.json`, "
        "those of each run in `benchmarks/results/ablations`.",
        "",
        _design(found),
        "",
        *_summary(found),
        "",
        "## What this does not show",
        "",
        f"* **Speakers: {found['corpus']}.** Those who read the training data read the test utterances too. So little "
        "speech, a tiny model and few steps: what helps here may not at the paper's scale, and a part that needs more "
        "steps to begin looks useless here.",
        "* What a part does on its own. Each is taken from a mixture with the base's weights, and a part with a small "
        "weight can matter little. No setting was tuned again for a variant, and no two changes were tried together.",
        f"* Much about other seeds: there are {len(seeds)} ({', '.join(map(str, seeds))}), of pre-training and of "
        f"fine-tuning. Intervals: 95%, by {RESAMPLES} bootstrap resamples of the test utterances, each drawn with all "
        "its seeds, differences paired by utterance. That spans utterances, not seeds; so a variant is called better "
        "or worse only if the interval is clear of zero and every seed is on that side.",
        f"* All of them at once: {len(compared(found))} differences, each with an interval of its own; with so many, "
        "one may be clear of zero by chance.",
        "",
        *_recognition(found),
        *_held_out(found),
        "",
        "## Compute",
        "",
        "Minutes of wall time a seed, whatever else ran on the machine.",
        "",
        "| variant | pre-training | fine-tuning, transcripts |",
        "|---|---|---|",
    ]
    for arm, row in variants.items():
        lines.append(f"| {arm} | {row['minutes']['pre-training']:.1f} | {row['minutes']['fine-tuning']:.1f} |")
    made = ", ".join(commit[:13] for commit in found["commits"])
    there = "; ".join(found["CPU"])
    return (
        "\n".join([*lines, "", f"{found['hours']:.2f} hours in all; on {there}; the runs are of commit {made}."]) + "\n"
    )


def _design(found: Mapping[str, Any]) -> str:
    settings, base = found["settings"], found["base"]
    keys = ", ".join(f"`{key}`" for key in settings["keys"])
    said = f"One stage from scratch: `{settings['config']}` with {keys}, {settings['steps']} steps"
    if base is not None:
        each, hours = base["seconds_per_step"], base["hours"]
        said += (
            f" of {each['speech']:g} s of speech (from {hours['speech']:.1f} hours), {base['tokens_per_step']} tokens "
            f"of text and {each['pairs']:g} s of pairs (from {hours['pairs']:.1f} hours: {', '.join(base['pairs'])}). "
            f"Weights: {', '.join(f'{name} {weight:g}' for name, weight in base['weights'].items())}"
        )
    return (
        f"{said}. Each variant changes one thing. Then {settings['task_steps']} steps of fine-tuning for Spanish "
        f"recognition (`{settings['task']}`, {found['labelled']} utterances): few, so that the start counts."
    )


def _summary(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for how in ("better", "worse", UNCLEAR):
        arms = [arm for arm in compared(found) if judged(found, arm) == how]
        said = ", ".join(f"{arm} ({found['variants'][arm]['difference']['value']:+.1f})" for arm in arms)
        lines += [f"* Character error rate (CER) minus base, {how}: {said}."] if arms else []
    return lines


def _recognition(found: Mapping[str, Any]) -> list[str]:
    rows = found["variants"]
    number = next(iter(rows.values()))["utterances"]
    lines = [
        "## Recognition after short fine-tuning",
        "",
        f"CER of {number} utterances (test and dev; nothing was chosen by them); lower is better.",
        "",
        f"![CER by variant, with intervals and seeds, and its difference from base](images/{RECOGNITION})",
        "",
        "| variant | | CER | of the seeds | minus base | seeds below base | |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, row in rows.items():
        cells = ["", "", ""]
        if row["difference"] is not None:
            below = differences(found, arm)
            cells = [str(Interval(**row["difference"])), f"{sum(d < 0 for d in below)} of {len(below)}"]
            cells.append(judged(found, arm))
        seeds = ", ".join(f"{score:.1f}" for score in row["seeds"])
        cells = [arm, row["title"], str(Interval(**row["score"])), seeds, *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _held_out(found: Mapping[str, Any]) -> list[str]:
    """Means over seeds, and the least and the most of them."""
    figures = [figure.title for figure in FIGURES]
    lines = [
        "",
        "## Held-out figures at the end of pre-training",
        "",
        "Mean over seeds (least to most), on utterances and lines that were not trained on. A variant's figures are "
        "taken under its own masks, codes and normalisation: with other mask rates the question is another one, and a "
        "random projection's codes are others, so these tell whether a part learns, not which variant is better. "
        "Information gain: entropy of the codes' histogram less the cross entropy of the masked codes. Contrastive "
        "margin: accuracy with the true context less that with another utterance's.",
        "",
        f"![held-out figures by variant, a dot a seed](images/{HELD_OUT})",
        "",
        f"| variant | {' | '.join(figures)} |",
        "|" + "---|" * (1 + len(figures)),
    ]
    for arm, row in found["variants"].items():
        if arm != UNTRAINED:
            cells = [_spread(row["held_out"].get(title, ())) for title in figures]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def pictures(found: Mapping[str, Any]) -> dict[str, bytes]:
    """SVG files by name."""
    rows = found["variants"]
    arms = list(rows)[::-1]  # the first at the top
    with canvas(9, 0.9 + 0.27 * len(arms)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for place, arm in enumerate(arms):
            row = rows[arm]
            left.plot(row["seeds"], [place] * len(row["seeds"]), "o", color=GREY, markersize=3.5, gid=f"seeds-{arm}")
            _bar(left, row["score"], place, COLOURS[0], f"score-{arm}")
            if row["difference"] is not None:
                values = differences(found, arm)
                right.plot(values, [place] * len(values), "o", color=GREY, markersize=3.5)
                clear = judged(found, arm) != UNCLEAR
                _bar(right, row["difference"], place, COLOURS[1] if clear else GREY, f"difference-{arm}")
        right.axvline(0, color="black", linewidth=0.8)
        left.set_yticks(range(len(arms)), arms)
        left.set_title("CER, 95% interval; dots: seeds")
        right.set_title("minus base; coloured: clear")
        recognition = svg(figure)
    arms = [arm for arm in arms if arm != UNTRAINED]
    with canvas(11, 0.9 + 0.27 * max(len(arms), 4)) as figure:
        for number, (axes, shown) in enumerate(
            zip(figure.subplots(1, len(FIGURES), sharey=True), FIGURES, strict=True)
        ):
            for place, arm in enumerate(arms):
                values = rows[arm]["held_out"].get(shown.title, [])
                axes.plot(values, [place] * len(values), "o", color=COLOURS[number % len(COLOURS)], markersize=3.5)
            axes.set_title(shown.title.replace(": ", ":\n").replace(", ", ",\n", 1), fontsize=7.5)
            axes.set_yticks(range(len(arms)), arms)
        held_out = svg(figure)
    return {RECOGNITION: recognition, HELD_OUT: held_out}


def _bar(axes: Any, interval: Mapping[str, float], place: int, colour: str, name: str) -> None:
    """A score with its interval."""
    axes.plot([interval["low"], interval["high"]], [place, place], color=colour, linewidth=2, alpha=0.6, gid=name)
    axes.plot([interval["value"]], [place], "D", color=colour, markersize=4.5)
