"""The stream that fine-tuning on text reads: one or two texts with a target, from JSON-lines such as NeMo manifests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_slam.data.bad_rows import BadRow, BadRows
from nemo_slam.data.config import parse_stream
from nemo_slam.data.index import IndexBuilder, open_index
from nemo_slam.data.manifest import RowError, expand_paths, parse_json, scan_lines, string_value
from nemo_slam.data.stream import Stream
from nemo_slam.data.token_file import Tokenizer, TokenReader, TokenWriter
from nemo_slam.data.unknown_tokens import OF_SOURCES, OF_TARGETS, refuse_other_text
from nemo_slam.finetuning.config import SentencesConfig

# `length` and the three that follow it lie end to end from `start`: first text, second text, target.
COLUMNS = {"length": "<i4", "file": "<i4", "line": "<i4", "start": "<i8", "first": "<i4", "second": "<i4"}
COLUMNS |= {"target": "<i4"}
PURPOSE_SENTENCES = 6
_CHUNK = 4096

EncodeTargets = Callable[[list[str]], list[list[int]]]


@dataclass
class Sentences:
    """B rows. *Shape:* tokens: B vectors of int64, a row's texts end to end; lengths (B, k) of its k texts; targets: B
    vectors of int64."""

    tokens: list[np.ndarray]
    lengths: np.ndarray
    targets: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.tokens)


def target_value(row: dict, key: str) -> str:
    """A key's text; a label may be a whole number too. Raises RowError where there is none."""
    value = row.get(key)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else string_value(row, key).strip()


class SentenceStream(Stream):
    """Batches of texts with their targets; order and exactness are those of pre-training's streams.

    Args:
        node: keys of `SentencesConfig`.
        tokenizer: path of the source's SentencePiece model.
        encode_targets: gives each target's tokens (or its class). It may raise RowError, which marks one bad row.
        target_digest: names what `encode_targets` does, so that an index made with another is not taken.
        seed: of the order.
        target_tokenizer: what the targets' tokens are of; None where they are classes.
        max_target: rows with more target tokens are filtered and counted; None for no limit.
        name: for messages.

    Raises:
        DataError: more of the source's tokens, or of the targets', are unknown to their tokenizer than ``max_unknown``.
    """

    unit = "tokens"

    def __init__(
        self,
        node: Mapping[str, Any],
        tokenizer: str | Path,
        encode_targets: EncodeTargets,
        *,
        target_digest: str,
        seed: int,
        target_tokenizer: Tokenizer | None = None,
        max_target: int | None = None,
        bad_rows: BadRows | None = None,
        name: str = "train",
    ):
        self.config = config = parse_stream(SentencesConfig, node, f"data.{name}_ds")  # type: ignore[type-var]
        self.sources = expand_paths(config.manifest_filepath)
        model = Tokenizer(tokenizer)
        settings = {"keys": [*config.text_keys, config.target_key], "max": [config.max_tokens, max_target]}
        index = open_index(
            "sentences",
            self.sources,
            {**settings, "tokenizer": model.digest, "target": target_digest},
            COLUMNS,
            lambda builder: _scan(builder, self.sources, config, model, encode_targets, target_tokenizer, max_target),
            config.cache_dir,
        )
        sampling = {"frames_per_step": config.tokens_per_step, "window": config.window}
        super().__init__(name, index, {**sampling, "seed": seed, "purpose": PURPOSE_SENTENCES}, bad_rows or BadRows())
        unknown, total = index.meta["unknown_tokens"], index.meta["total_length"]
        where = f"data.{name}_ds, {', '.join(config.text_keys)}"
        refuse_other_text(unknown, total, config.max_unknown, where, model, OF_SOURCES)
        if target_tokenizer is not None:
            unknown, total = index.meta["unknown_target_tokens"], int(index.target.sum())
            where = f"data.{name}_ds, {config.target_key}"
            refuse_other_text(unknown, total, config.max_unknown, where, target_tokenizer, OF_TARGETS)
        self._tokens = TokenReader(index.folder, "<u4")

    def load(self, ids: np.ndarray, epochs: np.ndarray, step: int | None = None) -> Sentences:
        """The given examples, (B,) each, in the order given."""
        index = self.index
        first, second, target = (index.first[ids], index.second[ids], index.target[ids])
        tokens = [self._tokens.read(s, n) for s, n in zip(index.start[ids], first + second, strict=True)]
        starts = index.start[ids] + first + second
        targets = [self._tokens.read(s, n) for s, n in zip(starts, target, strict=True)]
        lengths = np.stack([first, second][: len(self.config.text_keys)], axis=1).astype(np.int64)
        return Sentences(tokens, lengths, targets)


def read_values(manifests: Sequence[Path], key: str) -> Iterator[str]:
    """The texts (or labels) under a key of all rows that have one; the stream lists those that have not."""
    for manifest in manifests:
        for _, _, raw in scan_lines(manifest):
            try:
                yield target_value(parse_json(raw), key)
            except RowError:
                continue


def _scan(
    builder: IndexBuilder,
    manifests: list[Path],
    config: SentencesConfig,
    model: Tokenizer,
    encode_targets: EncodeTargets,
    target_tokenizer: Tokenizer | None,
    max_target: int | None,
) -> None:
    """Tokenises all rows into the index folder."""
    unknown = unknown_targets = 0
    with TokenWriter(builder.folder, "<u4") as writer:
        for number, manifest in enumerate(manifests):
            for chunk in _chunks(builder, manifest, config):
                texts = [model.encode([row[i] for _, row in chunk]) for i in range(len(config.text_keys))]
                for place, (line, row) in enumerate(chunk):
                    parts = [column[place] for column in texts]
                    try:
                        found = sum(map(model.check, parts))
                        (target,) = encode_targets([row[-1]])
                        found_targets = 0 if target_tokenizer is None else target_tokenizer.check(target)
                    except RowError as error:
                        builder.add_bad(BadRow(str(manifest), line, str(error)))
                        continue
                    length = sum(map(len, parts))
                    if length > config.max_tokens:
                        builder.filtered[f"longer than {config.max_tokens} tokens"] += 1
                        continue
                    if max_target is not None and len(target) > max_target:
                        builder.filtered[f"with a target longer than {max_target} tokens"] += 1
                        continue
                    unknown += found
                    unknown_targets += found_targets
                    start = writer.append([*(token for part in parts for token in part), *target])
                    second = len(parts[1]) if len(parts) > 1 else 0
                    builder.add(length, number, line, start, len(parts[0]), second, len(target))
            builder.end_source()
    builder.arrays["tokens"] = (writer.dtype, writer.size)
    builder.meta |= {"unknown_tokens": unknown, "unknown_target_tokens": unknown_targets}


def _chunks(
    builder: IndexBuilder, manifest: Path, config: SentencesConfig
) -> Iterator[list[tuple[int, tuple[str, ...]]]]:
    """Groups of (line, (texts..., target)); rows without one of them go to the builder."""
    chunk = []
    for line, _, raw in scan_lines(manifest):
        if raw.isspace():
            continue
        try:
            row = parse_json(raw)
            texts = [string_value(row, key).strip() for key in config.text_keys]
            chunk.append((line, (*texts, target_value(row, config.target_key))))
        except RowError as error:
            builder.add_bad(BadRow(str(manifest), line, str(error)))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
