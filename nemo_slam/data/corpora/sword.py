"""Reads the verses of a SWORD `zText` Bible module (OSIS markup, zlib blocks), as Debian's sword-text-* ship it.

A testament is three files: `*.bzs` maps a block to its place in the data (three little-endian uint32: offset,
compressed size, size), `*.bzv` maps a verse to its block (uint32 block, uint32 offset in the block, uint16 size), and
`*.bzz` holds the compressed blocks. Entry order is canonical order; the book and chapter numbers are not needed.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from html import unescape

from nemo_slam.data.corpora.files import CorpusError

_BLOCK, _VERSE = struct.Struct("<III"), struct.Struct("<IIH")
# Content that is not the verse: foot notes, headings, stage directions, variant readings.
_APART = re.compile(r"<(note|title|speaker|rdg|catchWord)\b[^>]*(?<!/)>.*?</\1>", re.DOTALL)
_BOOK_END = re.compile(r"<div\b[^>]*\beID=[^>]*\btype=\"book\"[^>]*>")
_FRONT_MATTER = re.compile(r"type=\"(?:introduction|x-introduction|front|glossary)\"")
_TAG = re.compile(r"<[^>]*>")


def verses(files: Mapping[str, bytes]) -> Iterator[str]:
    """Yields the plain text of every verse.

    Args:
        files: content by file name, with the six (or three) files ``ot.bzs .. nt.bzz`` of one module.

    Raises:
        CorpusError: the files are not a zText module compressed with zlib.
    """
    testaments = [name for name in ("ot", "nt") if f"{name}.bzs" in files]
    if not testaments:
        raise CorpusError(f"no zText module: expected ot.bzs or nt.bzs, found {sorted(files)}")
    for testament in testaments:
        index, places, data = (files.get(f"{testament}.{kind}", b"") for kind in ("bzs", "bzv", "bzz"))
        if not (places and data) or len(index) % _BLOCK.size or len(places) % _VERSE.size:
            raise CorpusError(f"damaged zText module: {testament}.bzs, .bzv and .bzz do not fit together")
        blocks: dict[int, bytes] = {}
        for number, offset, size in _VERSE.iter_unpack(places):
            if not size:
                continue
            if number not in blocks:
                blocks = {number: _block(testament, index, data, number)}
            if offset + size > len(blocks[number]):
                raise CorpusError(f"damaged zText module: {testament}.bzv points behind the end of block {number}")
            text = _plain(blocks[number][offset : offset + size].decode("utf-8"))
            if text:
                yield text


def _block(testament: str, index: bytes, data: bytes, number: int) -> bytes:
    try:
        start, packed, _ = _BLOCK.unpack_from(index, number * _BLOCK.size)
        return zlib.decompress(data[start : start + packed])
    except (struct.error, zlib.error) as error:
        raise CorpusError(f"damaged zText module: block {number} of {testament}.bzz ({error})") from error


def _plain(osis: str) -> str:
    """The words of one OSIS fragment; empty for front matter and bare milestones."""
    osis = _BOOK_END.split(osis)[0]
    if _FRONT_MATTER.search(osis):
        return ""
    return " ".join(unescape(_TAG.sub("", _APART.sub(" ", osis))).split())
