"""The report's pictures, by matplotlib, as SVG in data URIs: crisp, small, and nothing to run or to fetch.

A plotly page would add 4.5 MB of JavaScript to each file, and viewers that show CI artefacts or mail refuse scripts.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nemo_slam.evaluation.report.panels import Panel
from nemo_slam.evaluation.report.runs import Run, Series

# Okabe and Ito's colours, told apart by colour-blind readers; yellow, too light for lines, is left out.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
GREY = "#8a919c"
MOST_POINTS = 500
"""Longer curves are averaged into so many bins."""

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib's own, so every machine draws the same
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444b57",
    "axes.edgecolor": "#b7bdc7",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "grid.color": "#e8ebef",
    "grid.linewidth": 0.8,
    "xtick.color": "#444b57",
    "ytick.color": "#444b57",
    "svg.fonttype": "path",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches in the report's style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def svg(figure: Figure) -> bytes:
    """The figure as an SVG, the same bytes each time."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "nemo_slam"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """The figure as an SVG in a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode()


def colour(place: int) -> str:
    """Of the run at this place in the report."""
    return COLOURS[place % len(COLOURS)]


def thinned(series: Series, scale: float = 1.0, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, averaged into ``most`` bins where there are more; values that are not finite are left out."""
    steps, values = np.array(series.steps, float), np.array(series.values, float) * scale
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(steps) <= most:
        return steps, values
    parts = [np.array_split(column, most) for column in (steps, values)]
    return np.array([part.mean() for part in parts[0]]), np.array([part.mean() for part in parts[1]])


def curve(panel: Panel, runs: Sequence[Run], codes: Sequence[int | None] = ()) -> Figure:
    """One panel with all runs: thin lines for training, dots for validation, dotted lines for the guess to beat."""
    with canvas(3.6, 2.25) as figure:
        axes = figure.subplots()
        shown: list[np.ndarray] = []
        for place, run in enumerate(runs):
            for columns, validation in ((run.training, False), (run.validation, True)):
                for number, guess in enumerate(panel.guesses):
                    if guess in columns:
                        style = (0, (1, 1.5)) if number == 0 else (0, (4, 1.5)) if number == 1 else (0, (1, 4))
                        label = guess.rpartition("/")[2].replace("_", " ") if place == 0 else None
                        if label is not None and axes.get_legend_handles_labels()[1].count(label):
                            label = None
                        axes.plot(
                            *thinned(columns[guess], panel.scale),
                            color=colour(place),
                            linestyle=style,
                            linewidth=1.1,
                            alpha=0.75,
                            label=label,
                            gid="guess",
                        )
                if panel.column in columns:
                    steps, values = thinned(columns[panel.column], panel.scale)
                    shown.append(values)
                    axes.plot(
                        steps,
                        values,
                        color=colour(place),
                        linewidth=1.0 if validation else 1.3,
                        alpha=1.0 if validation else 0.6,
                        marker="o" if validation else None,
                        markersize=3.5,
                        gid="validation" if validation else "training",
                    )
                    _mark_not_finite(axes, columns[panel.column], place, everywhere=panel.column == "loss")
            if panel.codes and place < len(codes) and codes[place] is not None:
                axes.axhline(float(codes[place] or 0), color=GREY, linewidth=0.9, linestyle="--", gid="codes")
        if panel.zero_line:
            axes.axhline(0, color=GREY, linewidth=0.9, linestyle="--", gid="zero")
        _leave_out_the_start(axes, shown)
        if panel.guesses:
            _legend_of_guesses(axes)
        arrow = {"lower": "  ↓", "higher": "  ↑", "": ""}[panel.better]
        axes.set_title(panel.title + arrow)
        axes.set_xlabel("step")
        axes.set_ylabel(panel.unit)
        axes.margins(x=0.02)
    return figure


def _mark_not_finite(axes: Axes, series: Series, place: int, everywhere: bool) -> None:
    """Crosses at the bottom where a total loss is not a number. A part may be NaN for want of examples."""
    steps = [s for s, v in zip(series.steps, series.values, strict=True) if not math.isfinite(v)] if everywhere else []
    if steps:
        transform = axes.get_xaxis_transform()
        axes.plot(
            steps, [0.04] * len(steps), "x", color="#c62828", transform=transform, gid="not finite", clip_on=False
        )


def _leave_out_the_start(axes: Axes, shown: list[np.ndarray]) -> None:
    """The first values of a run may tower over all that follows: the axis then begins below them."""
    later = [values[max(1, len(values) // 20) :] if len(values) > 10 else values for values in shown]
    rest = np.concatenate(later) if later else np.zeros(0)
    everything = np.concatenate(shown) if shown else np.zeros(0)
    if len(rest) == 0:
        return
    low, high = float(rest.min()), float(rest.max())
    if everything.max() - low > 3 * (high - low) and high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))
    elif everything.max() == everything.min():
        axes.set_ylim(low - max(abs(low) * 0.1, 0.5), low + max(abs(low) * 0.1, 0.5))


def _legend_of_guesses(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        for handle in (legend := axes.legend(handles, labels, loc="best", handlelength=2.2)).legend_handles:
            if handle is not None:
                handle.set_color(GREY)  # type: ignore[attr-defined]
        legend.set_zorder(0)


def code_usage(counts: np.ndarray, place: int) -> Figure:
    """Share of each code (K,) among the targets, commonest first, with the share that each would have if all were
    alike."""
    share = np.sort(counts)[::-1] / max(counts.sum(), 1)
    with canvas(5.4, 2.3) as figure:
        axes = figure.subplots()
        axes.bar(np.arange(1, len(share) + 1), share, width=1.0, color=colour(place), linewidth=0)
        axes.axhline(1 / len(share), color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            "all codes alike",
            (len(share), 1 / len(share)),
            ha="right",
            va="bottom",
            color="#444b57",
            fontsize=7.5,
            xytext=(0, 2),
            textcoords="offset points",
        )
        axes.set_xlim(0.5, len(share) + 0.5)
        axes.set_xlabel(f"code, of {len(share)}, commonest first")
        axes.set_ylabel("share of targets")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if share[0] > 0.1 else 1))
    return figure
