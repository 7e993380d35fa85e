"""Pictures of a few validation examples: what was masked, which code was asked for, what lies near what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from nemo_slam.evaluation.report.figures import GREY, canvas

if TYPE_CHECKING:
    from nemo_slam.evaluation.report.examples import MaskedUtterance, PairSimilarity, Retrieval

HOP = 0.01
ROW = 0.04
"""Seconds of a feature frame, and of a row of the encoder."""


def code_colours(codes: int) -> ListedColormap:
    """As many colours as there are codes; neighbours in number are far apart in hue."""
    golden = (np.arange(codes) * 0.61803398875) % 1.0
    light = 0.62 + 0.3 * ((np.arange(codes) * 0.381966) % 1.0)
    phase = 2 * np.pi * (golden[:, None] + np.array([0.0, 1 / 3, 2 / 3]))
    return ListedColormap(np.clip(light[:, None] * (0.62 + 0.42 * np.cos(phase)), 0, 1))


def spectrogram(utterance: MaskedUtterance) -> Figure:
    """Log-mel with the masked spans shaded, and below it the code asked for and the code predicted at masked
    frames."""
    with canvas(9.0, 3.5) as figure:
        top, truth, guess = figure.subplots(3, 1, sharex=True, height_ratios=[8, 1, 1])
        seconds = utterance.mel.shape[1] * HOP
        values = utterance.mel
        low, high = np.percentile(values, [2, 99.5])
        top.imshow(
            values,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, len(values)),
            cmap="magma",
            vmin=low,
            vmax=high,
            interpolation="nearest",
        )
        for start, end in utterance.spans:
            top.axvspan(start * ROW, min(end * ROW, seconds), color="#56b4e9", alpha=0.45, linewidth=0)
            top.axvspan(start * ROW, min(end * ROW, seconds), ymin=0.965, color="#56b4e9", linewidth=0)
        top.set_ylabel("mel channel")
        top.set_title(
            f"{utterance.mask.mean():.0%} of {len(utterance.mask)} frames masked (blue), in whole spans; "
            f"{utterance.right:.0%} of the codes predicted right"
        )
        top.grid(visible=False)
        colours = code_colours(utterance.num_codes)
        for axes, codes, title in ((truth, utterance.codes, "code"), (guess, utterance.predicted, "predicted")):
            row = np.ma.masked_less(codes[None], 0)
            axes.imshow(
                row,
                aspect="auto",
                extent=(0, len(codes) * ROW, 0, 1),
                cmap=colours,
                vmin=-0.5,
                vmax=utterance.num_codes - 0.5,
                interpolation="nearest",
            )
            axes.set_yticks([])
            axes.set_ylabel(title, rotation=0, ha="right", va="center")
            axes.grid(visible=False)
        guess.set_xlabel("time, s")
        guess.set_xlim(0, seconds)
    return figure


def similarity(pair: PairSimilarity) -> Figure:
    """Cosine between every text token and every speech frame of a pair."""
    with canvas(5.6, max(2.2, 0.6 + 0.17 * len(pair.tokens))) as figure:
        axes = figure.subplots()
        limit = max(0.2, float(np.abs(pair.cosine).max()))
        image = axes.imshow(
            pair.cosine,
            aspect="auto",
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            extent=(0, pair.cosine.shape[1] * ROW, len(pair.tokens) - 0.5, -0.5),
            interpolation="nearest",
        )
        axes.set_yticks(range(len(pair.tokens)), pair.tokens, fontsize=7.5)
        axes.set_xlabel("time in the speech, s")
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="cosine", fraction=0.05, pad=0.02)
    return figure


def retrieval(found: Retrieval) -> Figure:
    """Probability that a text belongs to an utterance, all with all; rings mark each utterance's best text."""
    size = len(found.probability)
    with canvas(4.6, 4.0) as figure:
        axes = figure.subplots()
        image = axes.imshow(found.probability, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        for row, best in enumerate(found.best):
            right = bool(found.correct[row])
            axes.plot(best, row, "o", mfc="none", mec="#009e73" if right else "#d55e00", markersize=7, mew=1.6)
        axes.plot([-0.5, size - 0.5], [-0.5, size - 0.5], color=GREY, linewidth=0.6, linestyle=":")
        axes.set_xlabel("text")
        axes.set_ylabel("utterance")
        ticks = range(0, size, max(1, size // 8))
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="probability that they match", fraction=0.05, pad=0.03)
    return figure
