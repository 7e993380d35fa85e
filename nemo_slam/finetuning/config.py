"""The data sections of fine-tuning. Imports nothing heavy: keys are checked before anything else starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TranscriptConfig:
    """Stream of utterances with a target text.

    Attributes:
        manifest_filepath: a NeMo JSON-lines manifest, or a list of them (shards).
        frames_per_step: frames of 10 ms in a global batch, over all ranks and micro-batches.
        text_key: the manifest's key that holds the target: ``text``, or ``translation`` for speech translation.
        tarred_audio_filepaths: NeMo tar files that hold the audio, or None for plain files.
        min_duration, max_duration: utterances outside (seconds) are filtered and counted.
        max_unknown: share of tokens that may be unknown to the tokenizer; more is an error.
        window: number of index shards (of at most 8,192 rows) that are shuffled together.
        cache_dir: folder for the index; default beside the first manifest.
    """

    manifest_filepath: list[str]
    frames_per_step: int
    text_key: str = "text"
    tarred_audio_filepaths: list[str] | None = None
    min_duration: float = 0.3
    max_duration: float = 20.0
    max_unknown: float = 0.05
    window: int = 16
    cache_dir: str | None = None


@dataclass(frozen=True)
class SentencesConfig:
    """Stream of texts with a target.

    Attributes:
        manifest_filepath: JSON-lines, or a list of such files.
        tokens_per_step: source tokens in a global batch, over all ranks and micro-batches.
        text_key: the key that holds the text.
        second_key: the key of a second text (a hypothesis beside a premise), or None.
        target_key: the key that holds the target: a translation, or a label.
        max_tokens: rows with more source tokens are filtered and counted; a text is never cut.
        max_unknown: share of tokens that may be unknown to the tokenizer of source or target; more is an error.
        window: number of index shards (of at most 8,192 rows) that are shuffled together.
        cache_dir: folder for the index; default beside the first file.
    """

    manifest_filepath: list[str]
    tokens_per_step: int
    text_key: str = "text"
    second_key: str | None = None
    target_key: str = "translation"
    max_tokens: int = 256
    max_unknown: float = 0.05
    window: int = 16
    cache_dir: str | None = None

    @property
    def text_keys(self) -> list[str]:
        return [self.text_key] if self.second_key is None else [self.text_key, self.second_key]
