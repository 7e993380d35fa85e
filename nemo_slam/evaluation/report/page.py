"""Runs, pictures and tables as one HTML file."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import nemo_slam
from nemo_slam.evaluation.report import example_figures, figures
from nemo_slam.evaluation.report.examples import Examples, summary
from nemo_slam.evaluation.report.health import CHECKS, judge, num_codes, shown_checks
from nemo_slam.evaluation.report.panels import Panel, panels
from nemo_slam.evaluation.report.runs import Run, config_differences
from nemo_slam.evaluation.report.transcripts import Transcripts
from nemo_slam.training.environment import environment

TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Picture:
    """An SVG in a data URI, with the text that stands for it."""

    uri: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Shown:
    """A panel of one run: its pictures, or the reason why there are none."""

    run: str
    colour: str
    pictures: list[Picture]
    missing: str = ""


def render(runs: Sequence[Run], examples: Sequence[Examples], transcripts: Sequence[Transcripts]) -> str:
    """The page.

    Args:
        examples: one for each run.
        transcripts: any number of files.
    """
    runs = list(runs)
    healths = [judge(run) for run in runs]
    groups, throughput = panels(runs)
    colours = [figures.colour(i) for i in range(len(runs))]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template(TEMPLATE.name)
    return template.render(
        runs=[(run, colour, health) for run, colour, health in zip(runs, colours, healths, strict=True)],
        checks=[(CHECKS[i], [health.verdicts[i] for health in healths]) for i in shown_checks(healths)],
        curves=[(title, [_curve(panel, runs) for panel in group]) for title, group in groups.items()],
        throughput=[_curve(panel, runs) for panel in throughput],
        codes=_each(runs, examples, colours, "codes", _code_pictures),
        spectrograms=_each(runs, examples, colours, "spectrogram", _spectrogram_pictures),
        similarities=_each(runs, examples, colours, "similarity", _similarity_pictures),
        retrievals=_each(runs, examples, colours, "retrieval", _retrieval_pictures),
        transcripts=transcripts,
        differences=config_differences(runs),
        environments=_environments(runs),
        maker=environment(),
        made=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        version=nemo_slam.__version__,
        matplotlib=importlib.metadata.version("matplotlib"),
    )


def _curve(panel: Panel, runs: list[Run]) -> Picture:
    figure = figures.curve(panel, runs, [num_codes(run) for run in runs])
    values = []
    for run in runs:
        series = run.figure(panel.column)
        if series is not None:
            values.append(f"{run.label} ends at {series.values[-1] * panel.scale:.4g}")
    alt = f"{panel.title} ({panel.column}) by step: {'; '.join(values)}"
    return Picture(figures.data_uri(figure), alt, panel.column)


def _each(
    runs: list[Run],
    examples: Sequence[Examples],
    colours: list[str],
    panel: str,
    draw: Callable[[Examples, int], list[Picture]],
) -> list[Shown]:
    shown = []
    for place, (run, example) in enumerate(zip(runs, examples, strict=True)):
        missing = example.missing.get(panel, "")
        shown.append(Shown(run.label, colours[place], [] if missing else draw(example, place), missing))
    return shown


def _code_pictures(examples: Examples, place: int) -> list[Picture]:
    assert examples.code_counts is not None
    facts = summary(examples)
    if not facts:
        return []
    caption = (
        f"{facts['targets']:,} masked frames of validation: {facts['used']} of {len(examples.code_counts)} codes "
        f"occur, perplexity {facts['perplexity']:.1f} ({examples.source})"
    )
    uri = figures.data_uri(figures.code_usage(examples.code_counts, place))
    return [Picture(uri, f"Share of each code, commonest first. {caption}", caption)]


def _spectrogram_pictures(examples: Examples, place: int) -> list[Picture]:
    utterance = examples.spectrogram
    if utterance is None:
        return []
    spans = ", ".join(f"{a * 0.04:.2f} to {b * 0.04:.2f} s" for a, b in utterance.spans)
    caption = f"{examples.source}; each colour of the two strips is a code, of {utterance.num_codes}"
    return [
        Picture(
            figures.data_uri(example_figures.spectrogram(utterance)),
            f"Log-mel spectrogram, masked at {spans}",
            caption,
        )
    ]


def _similarity_pictures(examples: Examples, place: int) -> list[Picture]:
    note = "" if examples.trained_on_pairs else " (this run has trained on no pairs: nothing is to be expected here)"
    return [
        Picture(
            figures.data_uri(example_figures.similarity(pair)),
            f"Cosine of {len(pair.tokens)} tokens with {pair.cosine.shape[1]} speech frames",
            f"“{pair.text}”{note}",
        )
        for pair in examples.similarity
    ]


def _retrieval_pictures(examples: Examples, place: int) -> list[Picture]:
    found = examples.retrieval
    assert found is not None
    size = len(found.best)
    caption = (
        f"right first: {int(found.correct.sum())} of {size}; by chance 1 of {size}. Rings: each utterance's best text"
    )
    uri = figures.data_uri(example_figures.retrieval(found))
    return [Picture(uri, f"Matching probability of {size} utterances with {size} texts; {caption}", caption)]


def _environments(runs: list[Run]) -> list[tuple[str, list[Any]]]:
    """(what, value of each run), for the runs that recorded it."""
    keys = dict.fromkeys(key for run in runs if run.environment for key in run.environment)
    return [(key, [(run.environment or {}).get(key, "–") for run in runs]) for key in keys]
