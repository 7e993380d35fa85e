"""The streams' configuration. Imports nothing but the standard library, as :mod:`nemo_slam.config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from nemo_slam.config import ConfigError, check_keys, parse, shown

__all__ = ["STREAMS", "ConfigError", "PairsConfig", "SpeechConfig", "TextConfig", "parse_stream", "parse_streams"]

NEGATIVES = ("nearest", "rotated", "random", "mixed")


@dataclass(frozen=True)
class SpeechConfig:
    """Stream of utterances without text.

    Attributes:
        manifest_filepath: a NeMo JSON-lines manifest, or a list of them (shards).
        frames_per_step: frames of 10 ms in a global batch, over all ranks and micro-batches.
        tarred_audio_filepaths: NeMo tar files that hold the audio, or None for plain files. A list, a brace pattern
            `a_{0..9}.tar`, or NeMo's `a__OP_0..9_CL_.tar`; URLs that fsspec reads too (`s3://...`).
        min_duration: shorter utterances (seconds) are filtered and counted.
        max_duration: longer utterances (seconds) are filtered and counted.
        window: number of index shards (of at most 8,192 rows) that are shuffled together.
        cache_dir: folder for the index; default beside the first manifest.
    """

    manifest_filepath: list[str]
    frames_per_step: int
    tarred_audio_filepaths: list[str] | None = None
    min_duration: float = 0.3
    max_duration: float = 20.0
    window: int = 16
    cache_dir: str | None = None


@dataclass(frozen=True)
class TextConfig:
    """Stream of text without speech.

    Attributes:
        text_filepath: plain text (an example a line) or JSON-lines with a `text` key (`.json`, `.jsonl`), or a list.
        tokens_per_step: tokens in a global batch, over all ranks and micro-batches.
        max_tokens: longer lines are cut into near-equal pieces of at most this many tokens.
        min_tokens: shorter lines are filtered and counted.
        max_unknown: share of tokens that may be unknown to the tokenizer; more is an error.
        window: number of index shards (of at most 8,192 rows) that are shuffled together.
        cache_dir: folder for the index and the token file; default beside the first text file.
    """

    text_filepath: list[str]
    tokens_per_step: int
    max_tokens: int = 256
    min_tokens: int = 1
    max_unknown: float = 0.05
    window: int = 16
    cache_dir: str | None = None


@dataclass(frozen=True)
class PairsConfig:
    """Stream of utterances with their text, each with a text that is not its own.

    Attributes:
        manifest_filepath, frames_per_step, tarred_audio_filepaths, min_duration, max_duration, window, cache_dir:
            as in `SpeechConfig`.
        max_tokens: rows with a longer text are filtered and counted; a transcript is never cut.
        max_unknown: share of tokens that may be unknown to the tokenizer; more is an error.
        negatives: where the other text comes from: 'nearest' (an utterance of nearly the same duration and the same
            language), 'rotated' (the own tokens in a rotated order), 'random', or 'mixed' (nearest or rotated).
        neighbours: how many ranks in the order of duration a nearest negative may be away.
    """

    manifest_filepath: list[str]
    frames_per_step: int
    tarred_audio_filepaths: list[str] | None = None
    min_duration: float = 0.3
    max_duration: float = 20.0
    max_tokens: int = 256
    max_unknown: float = 0.05
    negatives: str = "nearest"
    neighbours: int = 8
    window: int = 16
    cache_dir: str | None = None


STREAMS = {"speech": SpeechConfig, "text": TextConfig, "pairs": PairsConfig}
_AT_LEAST_ONE = ("frames_per_step", "tokens_per_step", "max_tokens", "min_tokens", "window", "neighbours")

Config = TypeVar("Config", SpeechConfig, TextConfig, PairsConfig)


def parse_stream(cls: type[Config], node: Mapping[str, Any], where: str) -> Config:
    """Builds a stream's configuration from a plain dict or an OmegaConf node.

    Args:
        cls: one of the dataclasses above, or another with fields of these names.
        node: the keys and values.
        where: the node's place in the configuration, for messages, such as `train_ds.speech`.
    """
    if node is None:
        raise ConfigError(f"{where} must be a mapping of keys to values, got None")
    config = parse(cls, node, where)
    _check_limits(config, where)
    return config


def _check_limits(config: Any, where: str) -> None:
    """What must hold of values and between them."""
    for key in _AT_LEAST_ONE:
        if not 1 <= getattr(config, key, 1) < 1 << 31:  # an index counts lengths in 32 bits
            raise ConfigError(
                f"{where}.{key} must be a whole number from 1 to 2^31 - 1, got {shown(getattr(config, key))}"
            )
    if hasattr(config, "max_duration") and not 0 <= config.min_duration <= config.max_duration:
        raise ConfigError(
            f"{where}: min_duration ({config.min_duration}) must lie between 0 and max_duration ({config.max_duration})"
        )
    if not 0 <= getattr(config, "max_unknown", 0) <= 1:
        raise ConfigError(f"{where}.max_unknown must be a share from 0 to 1, got {shown(config.max_unknown)}")
    if hasattr(config, "negatives") and config.negatives not in NEGATIVES:
        raise ConfigError(f"{where}.negatives must be one of {', '.join(NEGATIVES)}, got {shown(config.negatives)}")
    if hasattr(config, "min_tokens") and config.min_tokens > config.max_tokens:
        raise ConfigError(f"{where}: min_tokens ({config.min_tokens}) is above max_tokens ({config.max_tokens})")


def parse_streams(node: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Builds the configurations of the streams that a node names. A stream set to null is left out.

    >>> parse_streams({"text": {"text_filepath": "a.txt", "tokens_per_step": 8}}, "train_ds")["text"].text_filepath
    ['a.txt']
    """
    check_keys(node, STREAMS, where)
    parsed = {
        key: parse_stream(STREAMS[key], node[key], f"{where}.{key}") for key in STREAMS if node.get(key) is not None
    }
    if not parsed:
        raise ConfigError(f"{where} names no stream: give at least one of {', '.join(STREAMS)}")
    return parsed
