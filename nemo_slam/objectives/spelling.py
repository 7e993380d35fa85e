"""Pieces of a tokenizer as characters: the targets of CTC with ``units: characters``.

The planner counts them, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sentencepiece


def spell(tokenizer: sentencepiece.SentencePieceProcessor) -> list[list[int]]:
    """The characters of each piece, see :func:`spellings`."""
    ids = range(tokenizer.get_piece_size())
    plain = [not (tokenizer.is_unknown(i) or tokenizer.is_control(i) or tokenizer.is_byte(i)) for i in ids]
    return spellings([tokenizer.id_to_piece(i) for i in ids], plain)


def spellings(pieces: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
    """Each piece as numbers of characters, counted in their order; a piece that is not plain (unknown, control, a byte)
    stays one symbol.

    Args:
        pieces: the vocabulary, by id.
        plain: (V,) whether a piece stands for its characters.
    """
    parts = [list(piece) if spelt else [piece] for piece, spelt in zip(pieces, plain, strict=True)]
    number = {symbol: i for i, symbol in enumerate(sorted({symbol for part in parts for symbol in part}))}
    return [[number[symbol] for symbol in part] for part in parts]


def symbol_count(spelling: Sequence[Sequence[int]]) -> int:
    """How many symbols there are, without CTC's blank."""
    return 1 + max(symbol for symbols in spelling for symbol in symbols)
