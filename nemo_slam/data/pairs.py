"""The pair stream: transcribed utterances, each with a text that is not its own (for speech-text matching)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nemo_slam.data.audio_rows import COLUMNS, TAR_COLUMNS, AudioRows, scan_audio_rows
from nemo_slam.data.bad_rows import BadRow, BadRows, DataError
from nemo_slam.data.batch import PairBatch
from nemo_slam.data.config import PairsConfig
from nemo_slam.data.index import IndexBuilder, open_index
from nemo_slam.data.manifest import RowError, expand_paths, expand_sources
from nemo_slam.data.negatives import Negatives, add_neighbourhood, text_hash, tokens_hash
from nemo_slam.data.remote import Source
from nemo_slam.data.sampling import PURPOSE_PAIRS
from nemo_slam.data.stream import Stream
from nemo_slam.data.tar import TarMembers, identity
from nemo_slam.data.token_file import Tokenizer, TokenReader, TokenWriter
from nemo_slam.data.unknown_tokens import OF_PRETRAINING, refuse_other_text

TEXT_COLUMNS = {"start": "<i8", "tokens_length": "<i4", "text_hash": "<u8", "tokens_hash": "<u8", "lang": "<i4"}


class PairStream(Stream):
    """Batches of utterances with their text and a negative text.

    Args:
        config: see `PairsConfig`.
        tokenizer: path of a SentencePiece model.
        seed: of the order and of the negatives.
        bad_rows: where unusable rows are listed.
        name: for messages.
    """

    def __init__(
        self,
        config: PairsConfig,
        tokenizer: str | Path,
        *,
        seed: int,
        bad_rows: BadRows | None = None,
        name: str = "pairs",
    ):
        self.config = config
        self.sources = expand_paths(config.manifest_filepath)
        tars = None if config.tarred_audio_filepaths is None else expand_sources(config.tarred_audio_filepaths)
        model = Tokenizer(tokenizer)
        index = open_index(
            "pairs",
            [*self.sources, *(tars or [])],
            {
                "durations": [config.min_duration, config.max_duration],
                "max_tokens": config.max_tokens,
                "tokenizer": model.digest,
                "tars": identity(tars),
            },
            (COLUMNS if tars is None else COLUMNS | TAR_COLUMNS) | TEXT_COLUMNS,
            lambda builder: _scan(builder, self.sources, tars, config, model),
            config.cache_dir,
        )
        sampling = {
            "frames_per_step": config.frames_per_step,
            "seed": seed,
            "purpose": PURPOSE_PAIRS,
            "window": config.window,
        }
        super().__init__(name, index, sampling, bad_rows or BadRows())
        if index.meta["distinct_texts"] < 2:
            raise DataError(
                f"stream {name!r}: all {len(index)} rows have the same text, but matching needs a text that does not "
                "belong to the utterance. Give manifests with at least two different texts"
            )
        unknown, total = index.meta["unknown_tokens"], int(index.tokens_length.sum())
        where = f"text of the pairs in {self.sources[0]}"
        refuse_other_text(unknown, total, config.max_unknown, where, model, OF_PRETRAINING)
        self._audio = AudioRows(self, self.sources, tars)
        self._tokens = TokenReader(index.folder, model.dtype)
        self._negatives = Negatives(index, seed, config.negatives, config.neighbours)

    def text(self, example_id: int) -> np.ndarray:
        """The tokens of an example's own text, (n,) int64."""
        return self._tokens.read(self.index.start[example_id], self.index.tokens_length[example_id])

    def negative(self, example_id: int, epoch: int) -> np.ndarray:
        """The tokens of the text that does not belong to the example, (n,) int64; another one each epoch."""
        return self._negatives.tokens(int(example_id), int(epoch), self.text)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs in the text, (vocab_size,) int64; of a large text, in a million tokens of it."""
        return self._tokens.counts(vocab_size)

    def load(self, ids: np.ndarray, epochs: np.ndarray, step: int | None = None) -> PairBatch:
        """The batch of the given examples, (B,) each; those that cannot be loaded are left out and listed."""
        kept, audio, audio_lengths = self._audio.load(ids, step)
        ids, epochs = ids[kept], epochs[kept]
        tokens, lengths = _pack([self.text(i) for i in ids])
        negative_tokens, negative_lengths = _pack([self.negative(i, e) for i, e in zip(ids, epochs, strict=True)])
        return PairBatch(
            audio=audio,
            audio_lengths=audio_lengths,
            tokens=tokens,
            lengths=lengths,
            negative_tokens=negative_tokens,
            negative_lengths=negative_lengths,
            text_classes=torch.from_numpy(self.index.text_class[ids].astype(np.int64)),
            ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs),
        )


def _pack(sequences: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences end to end, (N,) int64, and their lengths, (B,) int64."""
    packed = np.concatenate([np.zeros(0, np.int64), *sequences])
    return torch.from_numpy(packed), torch.tensor([len(s) for s in sequences], dtype=torch.int64)


def _scan(
    builder: IndexBuilder, manifests: list[Path], tars: list[Source] | None, config: PairsConfig, model: Tokenizer
) -> None:
    """Indexes the manifests and tokenises their texts into the index folder."""
    too_long = f"longer than {config.max_tokens} tokens"
    languages: dict[str, int] = {}
    unknown = 0
    members = None if tars is None else TarMembers(tars)
    with TokenWriter(builder.folder, model.dtype) as writer:
        for chunk in scan_audio_rows(builder, manifests, config, True, members):
            encoded = model.encode([row.text for row, _ in chunk])
            for (row, values), tokens in zip(chunk, encoded, strict=True):
                try:
                    strange = model.check(tokens)
                except RowError as error:
                    builder.add_bad(BadRow(str(manifests[values[1]]), values[2], str(error)))
                    continue
                if len(tokens) > config.max_tokens:
                    builder.filtered[too_long] += 1
                    continue
                unknown += strange
                language = languages.setdefault(row.lang, len(languages))
                hashes = text_hash(row.text), tokens_hash(tokens)
                builder.add(*values, writer.append(tokens), len(tokens), *hashes, language)
    builder.arrays["tokens"] = (writer.dtype, writer.size)
    builder.meta |= {"languages": list(languages), "unknown_tokens": unknown}
    add_neighbourhood(builder)
