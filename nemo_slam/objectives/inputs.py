"""What an objective asks of a step: which sequences it adds to the packed batch and what is masked in them.

An objective declares its inputs once, at construction; :mod:`nemo_slam.models.step` packs the inputs of all
objectives of a stage together and runs each encoder once. A new objective adds sequences, not a branch in the model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeechMasking:
    """Spans of ``span`` subsampled frames, each starting with ``start_probability``, overlaps allowed (w2v-BERT,
    section 3.3)."""

    start_probability: float
    span: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.start_probability <= 1 or self.span < 1:
            raise ValueError(f"start_probability must lie in [0, 1] and span be positive, got {self}")


@dataclass(frozen=True)
class TokenMasking:
    """A share ``rate`` of the tokens in spans of ``span`` (SpanBERT's masking as SLAM uses it, section 3.2)."""

    rate: float
    span: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or self.span < 1:
            raise ValueError(f"rate must lie in [0, 1] and span be positive, got {self}")


@dataclass(frozen=True)
class SpeechInput:
    """The utterances of a stream (``speech`` or ``pairs``) through the speech encoder, masked or not.

    Attributes:
        draw: 0 to 15, another one for each input that masks the same stream: what replaces masked rows depends on it.
    """

    name: str
    stream: str
    masking: SpeechMasking | None = None
    draw: int = 0


@dataclass(frozen=True)
class TextInput:
    """The texts of a stream (``text`` or ``pairs``), or the pairs' negatives, through the text encoder.

    Attributes:
        draw: as in :class:`SpeechInput`.
    """

    name: str
    stream: str
    masking: TokenMasking | None = None
    negative: bool = False
    draw: int = 0


@dataclass(frozen=True)
class MultimodalInput:
    """A kind of sequence for the multimodal encoder: [CLS], then a speech input, then a text input, each optional."""

    name: str
    cls: bool = False
    speech: str | None = None
    text: str | None = None

    def segments(self) -> list[str]:
        """The segments in order, by what they hold: ``cls``, ``speech``, ``text``."""
        return [part for part, present in (("cls", self.cls), ("speech", self.speech), ("text", self.text)) if present]
