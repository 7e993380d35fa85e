"""The stream that fine-tuning reads: utterances with the text to predict, from NeMo manifests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_slam.data.audio_rows import COLUMNS, TAR_COLUMNS, AudioRows, scan_audio_rows
from nemo_slam.data.bad_rows import BadRow, BadRows
from nemo_slam.data.config import parse_stream
from nemo_slam.data.index import IndexBuilder, open_index
from nemo_slam.data.manifest import Files, RowError, expand_paths, parse_json, scan_lines, string_value
from nemo_slam.data.stream import Stream
from nemo_slam.data.tar import TarMembers, identity
from nemo_slam.data.token_file import Tokenizer, TokenReader, TokenWriter
from nemo_slam.data.unknown_tokens import OF_TARGETS, refuse_other_text
from nemo_slam.finetuning.config import TranscriptConfig

TEXT_COLUMNS = {"start": "<i8", "tokens_length": "<i4"}
PURPOSE_TRANSCRIPTS = 5


@dataclass(frozen=True)
class Limits:
    """What a model can learn from.

    Attributes:
        ctc_frame: frames of 10 ms in one encoder frame, if the model is trained with CTC, which places one token
            each.
        max_tokens: an attention decoder's positions, less those of the begin and end symbols.
    """

    ctc_frame: int | None = None
    max_tokens: int | None = None

    def broken_by(self, frames: int, tokens: list[int]) -> str | None:
        """Why a row is no use, or None."""
        if self.ctc_frame is not None and ctc_frames_needed(tokens) > -(-frames // self.ctc_frame):
            return "with more tokens than CTC can place"
        if self.max_tokens is not None and len(tokens) > self.max_tokens:
            return f"longer than {self.max_tokens} tokens"
        return None


@dataclass
class Utterances:
    """*Shape:* audio (B, T) float32, zero-padded; audio_lengths (B,) int64 samples; tokens: B vectors of int64."""

    audio: Tensor
    audio_lengths: Tensor
    tokens: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.tokens)


def collate(
    utterances: Utterances, pad_id: int = 0, start_id: int | None = None, end_id: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stock ASR models unpack in ``training_step``.

    *Shape:* signal (B, T) float32, signal lengths (B,), tokens (B, U) int64 padded with ``pad_id``, their lengths (B,).
    """
    before = [] if start_id is None else [start_id]
    after = [] if end_id is None else [end_id]
    tokens = [torch.tensor([*before, *row.tolist(), *after], dtype=torch.int64) for row in utterances.tokens]
    lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=pad_id)
    return utterances.audio, utterances.audio_lengths, padded, lengths


class TranscriptStream(Stream):
    """Batches of utterances with their tokens; order and exactness are those of pre-training's streams.

    Args:
        node: keys of `TranscriptConfig`.
        tokenizer: path of a SentencePiece model.
        seed: of the order.
        limits: rows that the model cannot learn from are filtered and counted.
        name: for messages.

    Raises:
        DataError: more of the text's tokens are unknown to the tokenizer than ``max_unknown`` allows.
    """

    def __init__(
        self,
        node: Mapping[str, Any],
        tokenizer: str | Path,
        *,
        seed: int,
        limits: Limits | None = None,
        bad_rows: BadRows | None = None,
        name: str = "train",
    ):
        self.config = config = parse_stream(TranscriptConfig, node, f"data.{name}_ds")  # type: ignore[type-var]
        self.sources = expand_paths(config.manifest_filepath)
        tars = None if config.tarred_audio_filepaths is None else expand_paths(config.tarred_audio_filepaths)
        model = Tokenizer(tokenizer)
        limits = limits or Limits()
        index = open_index(
            "transcripts",
            [*self.sources, *(tars or [])],
            {
                "durations": [config.min_duration, config.max_duration],
                "text_key": config.text_key,
                "tokenizer": model.digest,
                "tars": identity(tars),
                "limits": vars(limits),
            },
            (COLUMNS if tars is None else COLUMNS | TAR_COLUMNS) | TEXT_COLUMNS,
            lambda builder: _scan(builder, self.sources, tars, config, model, limits),
            config.cache_dir,
        )
        sampling = {
            "frames_per_step": config.frames_per_step,
            "seed": seed,
            "purpose": PURPOSE_TRANSCRIPTS,
            "window": config.window,
        }
        super().__init__(name, index, sampling, bad_rows or BadRows())
        unknown, total = index.meta["unknown_tokens"], int(index.tokens_length.sum())
        where = f"data.{name}_ds, {config.text_key}"
        refuse_other_text(unknown, total, config.max_unknown, where, model, OF_TARGETS)
        self._audio = AudioRows(self, self.sources, tars)
        self._tokens = TokenReader(index.folder, model.dtype)

    def text(self, example_id: int) -> np.ndarray:
        """The tokens of an example's text, (n,) int64."""
        return self._tokens.read(self.index.start[example_id], self.index.tokens_length[example_id])

    def load(self, ids: np.ndarray, epochs: np.ndarray, step: int | None = None) -> Utterances:
        """The given examples, (B,) each; those that cannot be loaded are left out and listed."""
        kept, audio, lengths = self._audio.load(ids, step)
        return Utterances(audio, lengths, [self.text(i) for i in ids[kept]])


def read_texts(manifests: Sequence[Path], key: str) -> Iterator[str]:
    """The target texts of manifests; rows without one are left to the stream, which lists them."""
    for manifest in manifests:
        for _, _, raw in scan_lines(manifest):
            with suppress(RowError):
                yield string_value(parse_json(raw), key).strip()


def ctc_frames_needed(tokens: list[int]) -> int:
    """Encoder frames that CTC needs for a token sequence: one each, and a blank between equal neighbours.

    >>> ctc_frames_needed([7, 7, 3])
    4
    """
    return len(tokens) + sum(a == b for a, b in pairwise(tokens))


def _scan(
    builder: IndexBuilder,
    manifests: list[Path],
    tars: list[Path] | None,
    config: TranscriptConfig,
    model: Tokenizer,
    limits: Limits,
) -> None:
    """Index the manifests and tokenise their texts into the index folder."""
    members = None if tars is None else TarMembers(tars)
    unknown = 0
    lines = Files(manifests)
    with TokenWriter(builder.folder, model.dtype) as writer:
        for chunk in scan_audio_rows(builder, manifests, config, False, members):  # type: ignore[arg-type]
            good, texts = [], []
            for values, text in _texts(builder, chunk, lines, config.text_key):
                good.append(values)
                texts.append(text)
            for values, tokens in zip(good, model.encode(texts), strict=True):
                try:
                    strange = model.check(tokens)
                except RowError as error:
                    builder.add_bad(BadRow(str(manifests[values[1]]), values[2], str(error)))
                    continue
                if reason := limits.broken_by(values[0], tokens):
                    builder.filtered[reason] += 1
                    continue
                unknown += strange
                builder.add(*values, writer.append(tokens), len(tokens))
    lines.close()
    builder.arrays["tokens"] = (writer.dtype, writer.size)
    builder.meta["unknown_tokens"] = unknown


def _texts(builder: IndexBuilder, chunk: list, lines: Files, key: str) -> Iterator[tuple[tuple, str]]:
    """The target text of each row, read from the line itself; rows without one go to the builder."""
    for _, values in chunk:
        _, file, line, offset, nbytes = values[: len(COLUMNS)]
        try:
            yield values, string_value(parse_json(lines.read(file, offset, nbytes)), key).strip()
        except RowError as error:
            builder.add_bad(BadRow(str(lines.paths[file]), line, str(error)))
