"""Texts that do not belong to an utterance, chosen so that their length does not give them away.

A random text is told from the true one by its length against the speech's. So a 'nearest' negative is the text of an
utterance of nearly the same duration (a few ranks away in the order of duration) and of the same language; its length
is then distributed as the true text's. It is never an equal text. A 'rotated' negative is the true text's own tokens
in a rotated order. Both are functions of (seed, example, epoch).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable

import numpy as np

from nemo_slam.data.index import Index, IndexBuilder
from nemo_slam.data.sampling import PURPOSE_NEGATIVES, keyed_words

_NEAREST, _ROTATED, _RANDOM, _WHICH = 0, 1, 2, 3
_RANDOM_TRIES = 16


def text_hash(text: str) -> int:
    """64 bits that agree for texts which differ in nothing but case, punctuation or spacing."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() or unicodedata.combining(c) else " " for c in plain).split()
    return _hash64((" ".join(words) or plain).encode())


def tokens_hash(tokens: list[int]) -> int:
    """64 bits that agree for equal token sequences."""
    return _hash64(np.array(tokens, "<u4").tobytes())


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def equal_texts(text_hashes: np.ndarray, token_hashes: np.ndarray) -> np.ndarray:
    """Classes of rows that count as having the same text: equal in either hash, directly or through others.

    *Shape:* (n,) each; returns (n,) int32, equal where the texts count as the same.
    """
    by_text = np.unique(text_hashes, return_inverse=True)[1]
    by_tokens = np.unique(token_hashes, return_inverse=True)[1]
    label = by_text
    while True:
        before = label
        for group in (by_tokens, by_text):
            lowest = np.full(len(label), len(label))
            np.minimum.at(lowest, group, label)
            label = lowest[group]
        if np.array_equal(label, before):
            return label.astype(np.int32)


def add_neighbourhood(builder: IndexBuilder) -> None:
    """Adds to a pair index what choosing negatives needs.

    Arrays: `text_class` (n,), see `equal_texts`; `order` (n,) rows by (group, duration, row); `rank` (n,) its inverse;
    `group_offsets`: where each group begins in `order`. A group is a language; a language with fewer than two
    different texts joins the most varied one.
    """
    length, lang = builder.column("length"), builder.column("lang")
    texts = equal_texts(builder.column("text_hash"), builder.column("tokens_hash"))
    builder.meta["distinct_texts"] = len(np.unique(texts))
    languages = np.unique(lang)
    variety = [len(np.unique(texts[lang == g])) for g in languages]
    group = lang.copy()
    for g, distinct in zip(languages, variety, strict=True):
        if distinct < 2:
            group[lang == g] = languages[int(np.argmax(variety))]
    order = np.lexsort((length, group)).astype(np.uint32)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order), dtype=np.uint32)
    starts = np.unique(group[order], return_index=True)[1]
    builder.add_array("text_class", texts)
    builder.add_array("order", order)
    builder.add_array("rank", rank)
    builder.add_array("group_offsets", np.append(starts, len(order)).astype(np.int64))


class Negatives:
    """Chooses the negative of each pair.

    Args:
        index: a pair index, see `add_neighbourhood`.
        seed: of the choice.
        kind: 'nearest', 'rotated', 'random' or 'mixed' (nearest or rotated, keyed).
        neighbours: how many ranks of duration away a nearest negative may be.
    """

    def __init__(self, index: Index, seed: int, kind: str, neighbours: int):
        self._index, self._seed, self._kind, self._neighbours = index, seed, kind, neighbours

    def tokens(self, example: int, epoch: int, text: Callable[[int], np.ndarray]) -> np.ndarray:
        """The negative's tokens, (n,) int64. `text` gives the tokens of any example."""
        kind = self._kind
        if kind == "mixed":
            kind = ("nearest", "rotated")[self._word(example, epoch, _WHICH) >> 63]
        if kind == "rotated":
            rotated = self._rotated(text(example), self._word(example, epoch, _ROTATED))
            if rotated is not None:
                return rotated
        if kind == "random":
            return text(self._random(example, epoch))
        return text(self._nearest(example, self._word(example, epoch, _NEAREST)))

    def _word(self, example: int, epoch: int, draw: int) -> int:
        words = keyed_words(
            np.array([example]), np.array([epoch]), seed=self._seed, purpose=PURPOSE_NEGATIVES, draw=draw
        )
        return int(words[0])

    def _nearest(self, example: int, word: int) -> int:
        """An example of the same group, at most `neighbours` ranks away if one there has another text."""
        rank = int(self._index.rank[example])
        offsets = self._index.group_offsets
        group = int(np.searchsorted(offsets, rank, side="right")) - 1
        low, high = int(offsets[group]), int(offsets[group + 1])
        reach = self._neighbours
        while True:
            candidates = self._index.order[max(low, rank - reach) : min(high, rank + reach + 1)]
            other = candidates[self._index.text_class[candidates] != self._index.text_class[example]]
            if len(other):
                return int(other[word % len(other)])
            reach *= 4  # ends: every group has at least two different texts

    def _random(self, example: int, epoch: int) -> int:
        """Any example with another text."""
        for draw in range(_RANDOM_TRIES):
            word = self._word(example, epoch, _RANDOM + 2 + draw)
            other = word % len(self._index)
            if self._index.text_class[other] != self._index.text_class[example]:
                return other
        return self._nearest(example, word)

    @staticmethod
    def _rotated(tokens: np.ndarray, word: int) -> np.ndarray | None:
        """The tokens rotated by a drawn amount that changes them, or None if none does."""
        n = len(tokens)
        for attempt in range(n - 1):
            rotated = np.roll(tokens, -(1 + (word + attempt) % (n - 1)))
            if not np.array_equal(rotated, tokens):
                return rotated
        return None
