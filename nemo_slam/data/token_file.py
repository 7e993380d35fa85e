"""Text tokenised once: a flat file of token ids that workers read by position."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.manifest import Files, RowError

logger = logging.getLogger(__name__)

TOKENS_FILE = "tokens"


class Tokenizer:
    """A SentencePiece model, without NeMo.

    Args:
        path: `tokenizer.model`.
    """

    def __init__(self, path: str | Path):
        import sentencepiece  # only needed where an index is built

        self.path = Path(path)
        try:
            blob = self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {path} ({error.strerror}): train one with scripts/train_tokenizer.py"
            ) from None
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=blob)
            self.vocab_size = self._model.vocab_size()
        except RuntimeError as error:
            raise DataError(f"{path} is not a SentencePiece model ({error})") from None
        if self.vocab_size == 0:
            raise DataError(f"{path} is not a SentencePiece model (it has no pieces)")
        self.digest = hashlib.blake2b(blob, digest_size=16).hexdigest()
        self.unk_id = self._model.unk_id()

    @property
    def dtype(self) -> str:
        """The smallest type that holds every id."""
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without begin and end tokens."""
        return self._model.encode(texts, out_type=int)

    def check(self, tokens: list[int]) -> int:
        """Number of unknown tokens. Raises RowError where nothing, or no more than half, is known."""
        if not tokens:
            raise RowError("text is empty: it has no tokens")
        unknown = tokens.count(self.unk_id)
        # A word of unknown characters is a word-boundary piece plus <unk>: half.
        if 2 * unknown >= len(tokens):
            raise RowError(f"text is unknown to the tokenizer: {unknown} of {len(tokens)} tokens")
        return unknown


class TokenWriter:
    """Appends token sequences to the token file of an index folder."""

    def __init__(self, folder: Path, dtype: str):
        self._file = open(folder / f"{TOKENS_FILE}.bin", "wb")  # noqa: SIM115
        self.dtype = dtype
        self.size = 0

    def append(self, tokens: Sequence[int] | np.ndarray) -> int:
        """Writes a sequence; returns where it starts, in tokens."""
        start = self.size
        self._file.write(np.array(tokens, self.dtype).tobytes())
        self.size += len(tokens)
        return start

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


class TokenReader:
    """Reads sequences by position. Not through a memory map: its pages would count as the worker's memory.

    Args:
        folder: the index folder.
        dtype: of the stored ids.
    """

    def __init__(self, folder: Path, dtype: str):
        path = folder / f"{TOKENS_FILE}.bin"
        self._files = Files([path])
        self._dtype = np.dtype(dtype)
        self._size = path.stat().st_size // self._dtype.itemsize

    def read(self, start: int, length: int) -> np.ndarray:
        """*Shape:* (length,) int64."""
        size = self._dtype.itemsize
        inside = 0 <= start <= start + length <= self._size
        raw = self._files.read(0, int(start) * size, int(length) * size) if inside else b""
        if not inside or len(raw) != length * size:
            raise DataError(
                f"{self._files.paths[0]} is damaged: no tokens {start} to {start + length}. Delete its folder, and "
                "it is built anew"
            )
        return np.frombuffer(raw, self._dtype).astype(np.int64)

    def counts(self, num: int, at_most: int = 1 << 20, stretches: int = 16) -> np.ndarray:
        """How often each of `num` ids occurs: in all tokens, or in `at_most` of them, in stretches spread evenly.

        *Shape:* (num,) int64.
        """
        if self._size <= at_most:
            return np.bincount(self.read(0, self._size), minlength=num)
        length = at_most // stretches
        starts = [(self._size - length) * i // (stretches - 1) for i in range(stretches)]
        return np.bincount(np.concatenate([self.read(start, length) for start in starts]), minlength=num)
