"""Which columns of ``metrics.csv`` are drawn together, under what title, in what unit.

A column that no panel names gets one of its own: a new figure appears in the report without a change here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_slam.evaluation.report.runs import Run

GUESSES = ("_chance", "_by_length", "_by_unigram", "_other_context")
"""Endings of columns that hold what a simple guess gets; they are drawn dotted behind the column they belong to."""

# Last part of a column -> (title, unit, what is better).
KNOWN = {
    "loss": ("Total loss, weighted", "nats", "lower"),
    "contrastive": ("Contrastive loss", "nats a masked frame", "lower"),
    "codes": ("Masked codes, loss", "nats a masked frame", "lower"),
    "diversity": ("Diversity loss", "1 − perplexity / codes", "lower"),
    "tokens": ("Masked tokens, loss", "nats a token", "lower"),
    "matching": ("Matching loss", "nats a decision", "lower"),
    "ctc": ("CTC loss", "nats a target", "lower"),
    "code_accuracy": ("Masked codes, accuracy", "share", "higher"),
    "contrastive_accuracy": ("Contrastive accuracy", "share", "higher"),
    "token_accuracy": ("Masked tokens, accuracy", "share", "higher"),
    "accuracy": ("Matching accuracy", "share", "higher"),
    "code_perplexity": ("Code perplexity", "codes in use", ""),
    "code_information_gain": ("Code information gain", "nats", "higher"),
    "code_usage": ("Codes that occur", "share of the codebook", ""),
    "mask_rate": ("Masked frames", "share", ""),
    "token_mask_rate": ("Masked tokens", "share", ""),
    "effective_rank": ("Effective rank of the output", "dimensions", ""),
    "text_given_speech": ("Masked tokens given speech", "share right", "higher"),
    "matching_choice": ("True text or its negative", "share right", "higher"),
    "lr": ("Learning rate", "", ""),
    "lr_encoder": ("Learning rate, encoder", "", ""),
    "skipped_steps": ("Skipped updates", "an interval", "lower"),
    "frames_per_second": ("Speech", "s of speech a second", "higher"),
    "speech_per_second": ("Speech", "s of speech a second", "higher"),
    "tokens_per_second": ("Text", "tokens a second", "higher"),
    "padding_share": ("Padding in attention", "share of positions", "lower"),
    "wer": ("Word error rate", "share", "lower"),
    "sacreBLEU": ("BLEU", "", "higher"),
}
# Drawn with another column, dotted: what a guess gets.
BESIDE = {
    "code_accuracy": ("code_top_share",),
    "text_given_speech": ("text_given_other_speech", "text_without_speech", "token_top_share"),
}
THROUGHPUT = ("frames_per_second", "speech_per_second", "tokens_per_second", "padding_share")
LEFT_OUT = ("seconds", "epoch", "global_step")
SCALE = {"frames_per_second": 0.01}  # 10 ms frames to seconds
ZERO_LINE = ("code_information_gain",)
GROUPS = {"": "All", "masked_speech": "Masked speech", "masked_text": "Masked text", "translation_lm": "Translation LM"}
GROUPS |= {"matching": "Matching", "ctc": "CTC", "probe": "Probes, at validation"}


@dataclass(frozen=True)
class Panel:
    """One small plot.

    Attributes:
        column: what is drawn; ``guesses`` are drawn dotted behind it.
        scale: values are multiplied by it.
    """

    column: str
    title: str
    unit: str
    better: str
    guesses: tuple[str, ...] = ()
    scale: float = 1.0
    zero_line: bool = False
    codes: bool = False  # the number of codes bounds it


def _last(column: str) -> str:
    return column.rpartition("/")[2]


def panel(column: str, columns: Iterable[str]) -> Panel:
    """The panel of a column, given all columns there are."""
    prefix, last = column[: -len(_last(column))], _last(column)
    present = set(columns)
    guesses = [prefix + name for name in BESIDE.get(last, ())] + [column + ending for ending in GUESSES]
    title, unit, better = KNOWN.get(last, (last.replace("_", " "), "", ""))
    return Panel(
        column,
        title,
        unit,
        better,
        tuple(name for name in guesses if name in present),
        SCALE.get(last, 1.0),
        last in ZERO_LINE,
        last == "code_perplexity",
    )


def panels(runs: list[Run]) -> tuple[dict[str, list[Panel]], list[Panel]]:
    """Panels of all columns of all runs, by group; and those of throughput and padding."""
    columns = list(dict.fromkeys(name for run in runs for part in (run.training, run.validation) for name in part))
    guessed = {name for column in columns for name in panel(column, columns).guesses}
    groups: dict[str, list[Panel]] = {}
    throughput = []
    for column in columns:
        if column in guessed or _last(column) in LEFT_OUT:
            continue
        if column in THROUGHPUT:
            throughput.append(panel(column, columns))
            continue
        prefix = column.partition("/")[0] if "/" in column else ""
        groups.setdefault(GROUPS.get(prefix, prefix), []).append(panel(column, columns))
    order = [*GROUPS.values()]
    known = list(KNOWN)
    for group in groups.values():
        group.sort(key=lambda p: known.index(_last(p.column)) if _last(p.column) in KNOWN else len(known))
    return dict(
        sorted(groups.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    ), throughput
