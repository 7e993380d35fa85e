"""The text stream: token sequences without speech, tokenised once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from nemo_slam.data.bad_rows import BadRow, BadRows
from nemo_slam.data.batch import TextBatch
from nemo_slam.data.config import TextConfig
from nemo_slam.data.index import Index, IndexBuilder, open_index
from nemo_slam.data.manifest import RowError, expand_paths, parse_json, scan_lines, string_value
from nemo_slam.data.sampling import PURPOSE_TEXT
from nemo_slam.data.stream import Stream
from nemo_slam.data.token_file import Tokenizer, TokenReader, TokenWriter
from nemo_slam.data.unknown_tokens import OF_PRETRAINING, refuse_other_text

COLUMNS = {"length": "<i4", "start": "<i8", "file": "<i4", "line": "<i4"}
_JSON_SUFFIXES = (".json", ".jsonl")
_CHUNK = 4096


class TextStream(Stream):
    """Batches of token sequences.

    Args:
        config: see `TextConfig`.
        tokenizer: path of a SentencePiece model.
        seed: of the order.
        bad_rows: where unusable lines are listed.
        name: for messages.
    """

    unit = "tokens"

    def __init__(
        self,
        config: TextConfig,
        tokenizer: str | Path,
        *,
        seed: int,
        bad_rows: BadRows | None = None,
        name: str = "text",
    ):
        self.config = config
        self.sources = expand_paths(config.text_filepath)
        model = Tokenizer(tokenizer)
        index = open_text_index(config, self.sources, model)
        sampling = {
            "frames_per_step": config.tokens_per_step,
            "seed": seed,
            "purpose": PURPOSE_TEXT,
            "window": config.window,
        }
        super().__init__(name, index, sampling, bad_rows or BadRows())
        self._tokens = TokenReader(index.folder, model.dtype)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs in the text, (vocab_size,) int64; of a large text, in a million tokens of it."""
        return self._tokens.counts(vocab_size)

    def load(self, ids: np.ndarray, epochs: np.ndarray, step: int | None = None) -> TextBatch:
        """The batch of the given examples, (B,) each, in the order given (the sampler's: by length)."""
        lengths = self.index.length[ids].astype(np.int64)
        tokens = [self._tokens.read(s, n) for s, n in zip(self.index.start[ids], lengths, strict=True)]
        return TextBatch(
            tokens=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *tokens])),
            lengths=torch.from_numpy(lengths),
            ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs),
        )


def open_text_index(
    config: TextConfig, sources: list[Path], model: Tokenizer, scan: Callable[[IndexBuilder], None] | None = None
) -> Index:
    """Opens the index of a text stream; ``scan`` fills it where there is none, by default `scan_text`.

    Raises:
        DataError: more of the tokens are unknown to the tokenizer than ``max_unknown`` allows.
    """
    index = open_index(
        "text",
        sources,
        {"tokens": [config.min_tokens, config.max_tokens], "tokenizer": model.digest},
        COLUMNS,
        scan or (lambda builder: scan_text(builder, sources, config, model)),
        config.cache_dir,
    )
    unknown, total = index.meta["unknown_tokens"], index.meta["total_length"]
    refuse_other_text(unknown, total, config.max_unknown, f"text in {sources[0]}", model, OF_PRETRAINING)
    return index


def scan_text(builder: IndexBuilder, paths: list[Path], config: TextConfig, model: Tokenizer) -> None:
    """Tokenises all lines into the index folder."""
    too_short = f"shorter than {config.min_tokens} tokens"
    split = unknown = 0
    with TokenWriter(builder.folder, model.dtype) as writer:
        for number, path in enumerate(paths):
            for chunk in _chunks(builder, path):
                for (line, _), tokens in zip(chunk, model.encode([text for _, text in chunk]), strict=True):
                    try:
                        strange = model.check(tokens)
                    except RowError as error:
                        builder.add_bad(BadRow(str(path), line, str(error)))
                        continue
                    if len(tokens) < config.min_tokens:
                        builder.filtered[too_short] += 1
                        continue
                    unknown += strange
                    pieces = split_evenly(tokens, config.max_tokens)
                    split += len(pieces) > 1
                    for piece in pieces:
                        builder.add(len(piece), writer.append(piece), number, line)
            builder.end_source()
    builder.arrays["tokens"] = (writer.dtype, writer.size)
    builder.meta |= {"split_lines": split, "unknown_tokens": unknown}


def split_evenly(tokens: list[int], at_most: int) -> list[list[int]]:
    """Cuts a sequence into as few pieces of at most `at_most` tokens as possible, their lengths differing by at most 1.

    >>> split_evenly([1, 2, 3, 4, 5], 3)
    [[1, 2], [3, 4, 5]]
    """
    pieces = -(-len(tokens) // at_most)
    cuts = [len(tokens) * p // pieces for p in range(pieces + 1)]
    return [tokens[a:b] for a, b in itertools.pairwise(cuts)]


def _chunks(builder: IndexBuilder, path: Path) -> Iterator[list[tuple[int, str]]]:
    """Groups of (line number, text); lines that are bad or blank go to the builder."""
    is_json = path.suffix in _JSON_SUFFIXES
    chunk = []
    for line, _, raw in scan_lines(path):
        if not raw.strip():
            builder.filtered["blank lines"] += 1
            continue
        try:
            text = string_value(parse_json(raw), "text") if is_json else raw.decode("utf-8")
        except (RowError, UnicodeDecodeError) as error:
            reason = str(error) if isinstance(error, RowError) else "not UTF-8"
            builder.add_bad(BadRow(str(path), line, reason))
            continue
        chunk.append((line, text.strip()))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
