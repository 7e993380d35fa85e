"""WER, CER, BLEU, chrF and accuracy of a corpus, with seeded bootstrap intervals.

Every metric is reduced to counts per utterance (n, k) and a function of their sum, so that a resample of the corpus is
one product. Where a reference is empty, the hypothesis counts as insertions and no reference length is added.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

METRICS = ("wer", "cer", "bleu", "chrf", "accuracy")
NORMALISATIONS = {
    "none": "texts compared as they are, after stripping",
    "basic": "NFKC, case folded, only letters, marks, digits and apostrophes kept, runs of space made one",
}
UNSEEN_SPACES = "\u061c\u200b\u200c\u200e\u200f\ufeff"
"""Of what is not seen, these become a space in our tokenizers (SentencePiece's nmt_nfkc), so in hypotheses too."""
LOWER_IS_BETTER = frozenset({"wer", "cer"})


def normalise(text: str, how: str) -> str:
    """A text under one of NORMALISATIONS.

    >>> normalise("¿Qué tal?  It's  GOOD.", "basic")
    "qué tal it's good"
    """
    if how == "none":
        return text.strip()
    if how != "basic":
        raise ValueError(f"normalisation {how!r} is not one of {', '.join(NORMALISATIONS)}")
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return " ".join("".join(map(_kept, folded)).split())


def _kept(character: str) -> str:
    """A character of a word as it is; what is not seen in one (a soft hyphen, a joiner) is gone; all else a space."""
    category = unicodedata.category(character)
    if character == "'" or category[0] in "LMN":
        return character
    return "" if category == "Cf" and character not in UNSEEN_SPACES else " "


@dataclass(frozen=True)
class Counts:
    """A metric's counts over a corpus, and how their sum becomes the score (in percent).

    *Shape:* per_utterance (n, k) float64.
    """

    metric: str
    per_utterance: np.ndarray
    score: Callable[[np.ndarray], float]
    signature: str

    def total(self) -> float:
        """The corpus score; nan where there is nothing to score."""
        return self.score(self.per_utterance.sum(axis=0))


@dataclass(frozen=True)
class Interval:
    """A score with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def count(metric: str, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """The counts of one metric.

    Args:
        metric: one of METRICS.
        references, hypotheses: texts of the same utterances.

    Raises:
        ValueError: an unknown metric, or lists of different lengths.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, {len(hypotheses)} hypotheses")
    if metric in ("wer", "cer"):
        return _edit_counts(metric, references, hypotheses)
    if metric in ("bleu", "chrf"):
        return _ngram_counts(metric, references, hypotheses)
    if metric == "accuracy":
        equal = np.array([[r == h, 1] for r, h in zip(references, hypotheses, strict=True)], np.float64).reshape(-1, 2)
        return Counts(metric, equal, _percentage, "share of equal texts")
    raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")


def _edit_counts(metric: str, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    import jiwer

    align = jiwer.process_words if metric == "wer" else jiwer.process_characters
    rows = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        found = align(reference, hypothesis)
        errors = found.substitutions + found.deletions + found.insertions
        rows.append((errors, found.hits + found.substitutions + found.deletions))
    counts = np.array(rows, np.float64).reshape(-1, 2)
    return Counts(metric, counts, _percentage, f"jiwer {metric}")


def _percentage(total: np.ndarray) -> float:
    return float(100 * total[0] / total[1]) if total[1] else math.nan


def _ngram_counts(metric: str, references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    from sacrebleu.metrics import BLEU, CHRF

    scorer = BLEU() if metric == "bleu" else CHRF()
    rows = scorer._extract_corpus_statistics(list(hypotheses), [list(references)]) if references else []
    counts = np.array(rows, np.float64).reshape(len(references), -1)

    signature = str(scorer.get_signature()) if references else f"sacrebleu {metric}"
    return Counts(metric, counts, partial(_ngram_score, scorer), signature)


def _ngram_score(scorer: Any, total: np.ndarray) -> float:
    return float(scorer._compute_score_from_stats([int(x) for x in total]).score) if total.any() else math.nan


def bleu_score(total: np.ndarray) -> float:
    """BLEU of summed counts of `count`."""
    from sacrebleu.metrics import BLEU

    return _ngram_score(BLEU(), total)


def _resampled(n: int, number: int, seed: int, *tables: np.ndarray) -> list[np.ndarray]:
    """Sums of each table's rows over utterances drawn with replacement, the same draws for all tables.

    *Shape:* tables (n, k) -> (number, k) each. One resample at a time: a million utterances fit as well.
    """
    generator = np.random.default_rng(seed)
    sums = [np.zeros((number, table.shape[1])) for table in tables]
    for i in range(number):
        occurs = np.bincount(generator.integers(0, n, size=n), minlength=n)
        for total, table in zip(sums, tables, strict=True):
            total[i] = occurs @ table
    return sums


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap(counts: Counts, resamples: int = 1000, seed: int = 0) -> Interval:
    """The score and the 95% interval over utterances drawn with replacement."""
    if not len(counts.per_utterance):
        return Interval(math.nan, math.nan, math.nan)
    (sums,) = _resampled(len(counts.per_utterance), resamples, seed, counts.per_utterance)
    return Interval(counts.total(), *_quantiles(np.array([counts.score(s) for s in sums])))


def paired_bootstrap(first: Counts, second: Counts, resamples: int = 1000, seed: int = 0) -> Interval:
    """Score of ``second`` minus score of ``first`` on the same utterances, each resample shared by both.

    Raises:
        ValueError: the two are not of the same utterances.
    """
    if first.per_utterance.shape != second.per_utterance.shape:
        raise ValueError(
            f"cannot pair {len(first.per_utterance)} utterances with {len(second.per_utterance)}: score the same ones"
        )
    if not len(first.per_utterance):
        return Interval(math.nan, math.nan, math.nan)
    sums = _resampled(len(first.per_utterance), resamples, seed, first.per_utterance, second.per_utterance)
    differences = np.array([second.score(b) - first.score(a) for a, b in zip(*sums, strict=True)])
    return Interval(second.total() - first.total(), *_quantiles(differences))
