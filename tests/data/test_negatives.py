"""Negatives: never an equal text, not told by their length, functions of (seed, example, epoch)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from corpus_helpers import sentence, write_manifest
from hypothesis import given
from hypothesis import strategies as st

from nemo_slam.data.config import PairsConfig
from nemo_slam.data.negatives import Negatives, equal_texts, text_hash
from nemo_slam.data.pairs import PairStream


def make_stream(tmp_path, tokenizer, rows, **options) -> PairStream:
    manifest = write_manifest(tmp_path / "m.json", [{"audio_filepath": "none.wav", **r} for r in rows])
    return PairStream(PairsConfig([str(manifest)], 100, **options), tokenizer, seed=5)


@pytest.fixture
def long_and_short(tmp_path):
    """1500 rows whose text length follows their duration, with some noise, as speech does."""
    rng = np.random.default_rng(0)
    durations = rng.uniform(0.5, 15, 1500)
    return [
        {"duration": float(d), "text": sentence(i, max(1, round(d * 2.5 * rng.uniform(0.7, 1.3))))}
        for i, d in enumerate(durations)
    ]


def length_only_accuracy(stream: PairStream, epochs: int) -> float:
    """How often the text whose length fits the duration better (by a fit on the true pairs) is the true one."""
    durations, lengths = np.log(stream.index.length), np.log(stream.index.tokens_length)
    expected = np.polyval(np.polyfit(durations, lengths, 2), durations)
    score = []
    for epoch in range(epochs):
        for i in range(len(stream.index)):
            own = abs(lengths[i] - expected[i])
            other = abs(np.log(len(stream.negative(i, epoch))) - expected[i])
            score.append(0.5 if own == other else float(own < other))
    return float(np.mean(score))


def test_length_alone_does_not_tell(tmp_path, tokenizer, long_and_short):
    stream = make_stream(tmp_path, tokenizer, long_and_short, max_tokens=500)
    assert len(stream.index) == 1500
    # Three standard errors of 1500 pairs are 3.9 points; epochs repeat the pairs, so they shrink the error only partly.
    assert abs(length_only_accuracy(stream, 3) - 0.5) < 0.039


def test_length_tells_a_random_text(tmp_path, tokenizer, long_and_short):
    """The measure itself can see a difference."""
    stream = make_stream(tmp_path, tokenizer, long_and_short, max_tokens=500, negatives="random")
    assert length_only_accuracy(stream, 1) > 0.8


def test_nearest_are_near_and_vary(tmp_path, tokenizer, long_and_short):
    stream = make_stream(tmp_path, tokenizer, long_and_short, max_tokens=500, neighbours=4)
    texts = {tuple(stream.text(i)): i for i in range(1500)}
    repeated = {t for t, n in Counter(tuple(stream.text(i)) for i in range(1500)).items() if n > 1}
    rank = np.argsort(np.argsort(stream.index.length, kind="stable"))
    distances = Counter()
    for i in range(0, 1500, 10):
        for epoch in range(8):
            negative = tuple(stream.negative(i, epoch))
            if negative not in repeated:  # a repeated text does not tell which row it came from
                distances[int(rank[texts[negative]]) - int(rank[i])] += 1
    assert set(distances) == {-4, -3, -2, -1, 1, 2, 3, 4}
    # 1200 draws over 8 distances: at most 150 each, standard deviation 11.5.
    assert all(90 < count < 200 for count in distances.values())


@pytest.mark.parametrize("kind", ["nearest", "random", "mixed", "rotated"])
def test_never_an_equal_text(tmp_path, tokenizer, kind):
    """Most rows share one text, written in different ways."""
    text = sentence(7, 12)
    same = [text, text.replace(" ", "  "), f" {text}.", text.replace(" ", ", ", 1)]
    rows = [{"duration": 1 + i / 100, "text": same[i % 4] if i % 40 else sentence(i, 3)} for i in range(200)]
    stream = make_stream(tmp_path, tokenizer, rows, negatives=kind)
    hashes = {i: text_hash(r["text"]) for i, r in enumerate(rows)}
    by_tokens = {tuple(stream.text(i)): hashes[i] for i in range(200)}
    for i in range(200):
        for epoch in range(3):
            negative = tuple(stream.negative(i, epoch))
            assert negative != tuple(stream.text(i))
            assert by_tokens.get(negative) != hashes[i]


def test_negatives_speak_the_same_language(tmp_path, tokenizer):
    rows = [{"duration": 1 + i / 100, "text": sentence(i, 3), "lang": ("en", "fr")[i % 2]} for i in range(100)]
    rows += [{"duration": 1.0, "text": "baden kefal ligor", "lang": "es"}]  # alone: joins another language
    stream = make_stream(tmp_path, tokenizer, rows)
    texts = {tuple(stream.text(i)): r["lang"] for i, r in enumerate(rows)}
    for i, row in enumerate(rows[:100]):
        # The lone Spanish text joins one group; nothing else crosses.
        assert texts[tuple(stream.negative(i, 0))] in (row["lang"], "es")
    assert texts[tuple(stream.negative(100, 0))] in ("en", "fr")


def test_a_language_of_one_text_joins_the_others(tmp_path, tokenizer):
    rows = [{"duration": 1.0, "text": "baden kefal", "lang": "en"}] * 30
    rows += [{"duration": 5.0, "text": sentence(i, 4), "lang": "fr"} for i in range(3)]
    stream = make_stream(tmp_path, tokenizer, rows)
    assert all(tuple(stream.negative(i, 0)) != tuple(stream.text(i)) for i in range(33))


def test_only_the_key_decides(tmp_path, tokenizer, long_and_short):
    stream = make_stream(tmp_path, tokenizer, long_and_short[:100], max_tokens=500, negatives="mixed")

    def draw(seed, epoch):
        negatives = Negatives(stream.index, seed, "mixed", 8)
        return [tuple(negatives.tokens(i, epoch, stream.text)) for i in range(100)]

    first = draw(1, 0)
    assert draw(1, 0) == first
    assert sum(a == b for a, b in zip(first, draw(1, 1), strict=True)) < 25
    assert sum(a == b for a, b in zip(first, draw(2, 0), strict=True)) < 25


def test_mixed_is_half_rotated(tmp_path, tokenizer, long_and_short):
    stream = make_stream(tmp_path, tokenizer, long_and_short[:400], max_tokens=500, negatives="mixed")
    rotated = sum(sorted(stream.negative(i, 0)) == sorted(stream.text(i)) for i in range(400))
    assert 160 < rotated < 240  # 200 expected, standard deviation 10


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 2**64 - 1))
def test_rotation(tokens, word):
    tokens = np.array(tokens)
    rotations = {tuple(np.roll(tokens, k)) for k in range(len(tokens))} - {tuple(tokens)}
    rotated = Negatives._rotated(tokens, word)
    assert (rotated is None) == (not rotations)
    assert rotated is None or tuple(rotated) in rotations


def test_where_no_rotation_differs_another_text_is_taken(tmp_path, tokenizer):
    rows = [{"duration": 1.0, "text": t} for t in ("b", "k", "baden")]
    stream = make_stream(tmp_path, tokenizer, rows, negatives="rotated")
    singles = [i for i in range(3) if len(set(stream.text(i).tolist())) == 1]
    for i in range(3):
        negative = stream.negative(i, 0).tolist()
        assert negative != stream.text(i).tolist()
        assert (sorted(negative) == sorted(stream.text(i))) == (i not in singles)


def test_equal_texts_through_either_hash():
    # 0 and 1 share a text, 1 and 2 share tokens, 3 stands alone, 4 and 5 share both
    assert len(set(equal_texts(np.array([7, 7, 8, 9, 5, 5]), np.array([1, 2, 2, 3, 4, 4]))[:3])) == 1
    classes = equal_texts(np.array([7, 7, 8, 9, 5, 5]), np.array([1, 2, 2, 3, 4, 4]))
    assert len(set(classes)) == 3


def test_text_hash():
    assert text_hash("Hello, World!") == text_hash("  hello world")
    assert text_hash("ｈｅｌｌｏ world") == text_hash("hello world")  # full-width letters
    assert text_hash("hello word") != text_hash("hello world")
    assert text_hash("...") != text_hash("!?")
    assert text_hash("côte") != text_hash("cote")
