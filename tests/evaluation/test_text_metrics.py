"""Scores against the libraries' own corpus scores and values worked out by hand."""

import math
import tracemalloc

import jiwer
import numpy as np
import pytest
import sacrebleu
import sentencepiece

from nemo_slam.data.tokenizer import _NORMALISATION
from nemo_slam.evaluation.text_metrics import (
    UNSEEN_SPACES,
    Counts,
    bootstrap,
    count,
    normalise,
    paired_bootstrap,
)

REFERENCES = ["press one to record your greeting", "hold the line", "thank you for calling", "goodbye"]
HYPOTHESES = ["press one to recall your greeting", "hold line", "thank you for for calling", "good bye"]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("wer", 100 * jiwer.wer(REFERENCES, HYPOTHESES)),
        ("cer", 100 * jiwer.cer(REFERENCES, HYPOTHESES)),
        ("bleu", sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score),
        ("chrf", sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score),
    ],
)
def test_corpus_scores_are_the_libraries_own(metric, expected):
    assert count(metric, REFERENCES, HYPOTHESES).total() == pytest.approx(expected, abs=1e-9)


def test_accuracy_is_the_share_of_equal_texts():
    assert count("accuracy", ["a", "b", "c", "d"], ["a", "x", "c", "e"]).total() == 50.0
    assert math.isnan(count("accuracy", [], []).total())


def test_an_empty_reference_counts_insertions_only():
    counts = count("wer", ["", "a b"], ["x y z", "a b"])
    assert counts.per_utterance.tolist() == [[3, 0], [0, 2]]
    assert counts.total() == 150.0
    assert math.isnan(count("wer", [""], ["x"]).total())
    assert math.isnan(bootstrap(count("cer", [], [])).value)


def test_interval_holds_the_score_and_depends_on_the_seed_alone():
    rng = np.random.default_rng(3)
    errors = np.stack([rng.integers(0, 4, 200), np.full(200, 10)], 1).astype(float)
    counts = Counts("wer", errors, lambda s: s[0] / s[1], "")
    first = bootstrap(counts, 500, seed=1)
    assert first == bootstrap(counts, 500, seed=1)
    assert first != bootstrap(counts, 500, seed=2)
    assert first.low < first.value < first.high
    # the mean of 200 draws of a variable with this spread has a normal interval of +-1.96 of its standard error
    half = 1.96 * counts.per_utterance[:, 0].std() / 10 / np.sqrt(200)
    assert first.high - first.low == pytest.approx(2 * half, rel=0.15)


def test_a_resample_is_utterances_drawn_with_replacement_and_takes_no_room():
    """The same draws, taken at once and summed one by one; and 200,000 utterances in a few megabytes."""
    counts = count("wer", REFERENCES, HYPOTHESES)
    draws = np.random.default_rng(4).integers(0, 4, size=(50, 4))
    scores = [counts.score(counts.per_utterance[draw].sum(axis=0)) for draw in draws]
    interval = bootstrap(counts, 50, seed=4)
    assert [interval.low, interval.high] == np.quantile(scores, [0.025, 0.975]).tolist()
    many = Counts("accuracy", np.ones((200_000, 2)), lambda s: s[0] / s[1], "")
    tracemalloc.start()
    try:
        assert bootstrap(many, 20).value == 1.0
        assert tracemalloc.get_traced_memory()[1] < 16e6  # all draws at once: 64e6
    finally:
        tracemalloc.stop()


def test_pairing_removes_what_both_share():
    """Two systems that differ by one word an utterance: the difference is certain, though each score is not."""
    rng = np.random.default_rng(0)
    errors = rng.integers(0, 8, 100).astype(float)
    length = np.full(100, 10.0)
    first, second = (
        Counts("wer", np.stack([errors + extra, length], 1), lambda s: 100 * s[0] / s[1], "") for extra in (0, 1)
    )
    difference = paired_bootstrap(first, second, 300, seed=0)
    assert difference.value == difference.low == difference.high == pytest.approx(10.0)
    assert bootstrap(first, 300).high - bootstrap(first, 300).low > 5


def test_pairing_needs_the_same_utterances():
    with pytest.raises(ValueError, match="cannot pair 2 utterances with 1"):
        paired_bootstrap(count("wer", ["a", "b"], ["a", "b"]), count("wer", ["a"], ["a"]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  ¡Hola,  MUNDO! ", "hola mundo"),
        ("it’s 5 o'clock", "it's 5 o'clock"),
        ("caf\u0065\u0301", "café"),
        ("...", ""),
        ("नमस्ते।", "नमस्ते"),
        ("so\u00adft കണ്\u200dമണി", "soft കണ്മണി"),  # not seen, and no end of a word
    ],
)
def test_basic_normalisation(text, expected):
    assert normalise(text, "basic") == expected


@pytest.mark.parametrize("character", UNSEEN_SPACES + "\u00ad\u200d")
def test_what_is_not_seen_is_no_error_of_what_a_tokenizer_gives_back(character):
    """A tokenizer of ours makes some of it a space, in what a model learns and so in what it says."""
    text = f"می{character}خواهم"
    said = sentencepiece.SentencePieceNormalizer(rule_name=_NORMALISATION).normalize(text).replace("\u2581", " ")
    assert normalise(said, "basic") == normalise(text, "basic")


def test_no_normalisation_keeps_case_and_marks():
    assert normalise(" It's, OK. ", "none") == "It's, OK."
