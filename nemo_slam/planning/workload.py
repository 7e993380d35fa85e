"""What one micro-batch of one rank holds: sequences by length, and how many of their rows are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FRAMES_PER_ROW = 4
"""Feature frames of 10 ms in a row of the encoders."""


@dataclass(frozen=True)
class Lengths:
    """Sequences of one kind.

    *Shape:* ``values`` (S,) rows of each; ``weights`` (S,) how many there are of each, not necessarily whole.
    """

    values: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, values: Sequence[float], weights: Sequence[float] | None = None) -> Lengths:
        array = np.asarray(values, np.float64)
        return cls(array, np.ones_like(array) if weights is None else np.asarray(weights, np.float64))

    def __add__(self, other: Lengths | float) -> Lengths:
        """Joined end to end, sequence by sequence."""
        return Lengths(self.values + (other.values if isinstance(other, Lengths) else other), self.weights)

    @property
    def count(self) -> float:
        return float(self.weights.sum())

    @property
    def rows(self) -> float:
        return float(self.weights @ self.values)

    @property
    def squares(self) -> float:
        """Pairs of rows that attention looks at."""
        return float(self.weights @ self.values**2)

    def to_rows(self) -> Lengths:
        """Feature frames to rows of the encoders."""
        return Lengths(np.ceil(self.values / FRAMES_PER_ROW), self.weights)

    def spaced_frames(self) -> float:
        """Frames of the front end's image, gaps between utterances included."""
        return float(self.weights @ ((self.values + 6) // 4 * 4))


@dataclass(frozen=True)
class MicroBatch:
    """Attributes:
    speech: feature frames (10 ms) of the speech stream's utterances.
    text: tokens of the text stream's texts.
    pair_speech, pair_text, pair_negative: of the pairs, in the same order: frames, tokens, tokens of the negatives.
    """

    speech: Lengths
    text: Lengths
    pair_speech: Lengths
    pair_text: Lengths
    pair_negative: Lengths

    @property
    def frames(self) -> float:
        return self.speech.rows + self.pair_speech.rows


@dataclass(frozen=True)
class TypicalLengths:
    """Averages of a corpus, where its own lengths are not given."""

    speech_seconds: float = 14.0
    text_tokens: float = 25.0
    pair_seconds: float = 12.0
    pair_tokens: float = 40.0


def streams_of(objectives: Mapping[str, Any]) -> set[str]:
    """The data streams that the enabled objectives read."""
    needs = {"masked_speech": "speech", "masked_text": "text"}
    return {needs.get(name, "pairs") for name, node in objectives.items() if node is not None}


def micro_batch(config: Mapping[str, Any], typical: TypicalLengths, parts: int) -> MicroBatch:
    """One of ``parts`` (ranks times micro-batches) of a step's budgets.

    Args:
        config: the resolved config of a run.
        typical: lengths of examples, all taken to be alike.
        parts: ranks times micro-batches.

    Raises:
        ValueError: the data lack a stream that the objectives need.
    """
    streams = streams_of(config["model"]["objectives"])
    train = config["data"]["train_ds"]

    def share(stream: str, budget: str, length: float) -> Lengths:
        if stream not in streams:
            return Lengths.of([])
        if train.get(stream) is None:
            raise ValueError(f"data.train_ds lacks {stream}: the enabled objectives need {', '.join(sorted(streams))}")
        return Lengths.of([length], [float(train[stream][budget]) / parts / length])

    pair_speech = share("pairs", "frames_per_step", 100 * typical.pair_seconds)
    pair_text = Lengths(np.full_like(pair_speech.values, typical.pair_tokens), pair_speech.weights)
    return MicroBatch(
        share("speech", "frames_per_step", 100 * typical.speech_seconds),
        share("text", "tokens_per_step", typical.text_tokens),
        pair_speech,
        pair_text,
        pair_text,
    )


def expected_masked_frames(lengths: Lengths, start_probability: float, span: int) -> np.ndarray:
    """Expected masked rows of each sequence: spans start anywhere that holds a whole span, overlaps allowed.

    *Shape:* (S,).
    """
    masked = np.zeros(len(lengths.values))
    for i, length in enumerate(lengths.values.astype(int)):
        starts = max(length - span + 1, 0)
        position = np.arange(length)
        # Starts that would cover a position: within the last `span` places, and among the possible ones.
        covering = np.minimum(position, starts - 1) - np.maximum(position - span + 1, 0) + 1
        masked[i] = np.sum(1 - (1 - start_probability) ** np.clip(covering, 0, None))
    return masked
