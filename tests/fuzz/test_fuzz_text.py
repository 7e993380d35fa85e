"""Damaged text files: every line is tokenised as SentencePiece alone does it, filtered and counted, or listed."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import sentencepiece
from fuzzing import damaged, damaged_row, inputs, joined, told

from nemo_slam.data.config import TextConfig
from nemo_slam.data.index import Index, IndexBuilder
from nemo_slam.data.text import COLUMNS, scan_text
from nemo_slam.data.token_file import Tokenizer, TokenReader

LINES = [
    "press one for the number",
    "please hold the line",
    "star",
    "two three two three two",
    "zwölf \u4e00 of",
    "call x",
]


def plain_text(line: bytes, is_json: bool) -> str | None:
    """The text of a line, or None if it has none."""
    try:
        text = json.loads(line.decode()) if is_json else line.decode()
    except (ValueError, RecursionError):
        return None
    if is_json:
        text = text.get("text") if isinstance(text, dict) else None
    if not isinstance(text, str) or not text.strip() or any("\ud800" <= c <= "\udfff" for c in text):
        return None
    return text.strip()


def plain_rows(content: bytes, is_json: bool, model, limits: tuple[int, int]) -> tuple[list, Counter, list[int]]:
    """(line, tokens) of each row that is kept, what is filtered, and the lines that cannot be used."""
    kept, filtered, bad = [], Counter(), []
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            filtered["blank"] += number < len(lines) or bool(line)  # nothing follows the last line end
            continue
        text = plain_text(line, is_json)
        tokens = model.encode(text) if text is not None else []
        if not tokens or 2 * tokens.count(model.unk_id()) >= len(tokens):
            bad.append(number)
        elif len(tokens) < limits[0]:
            filtered["short"] += 1
        else:
            kept.append((number, tokens))
    return kept, filtered, bad


@pytest.fixture(scope="module")
def model(tokenizer_model):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))


def test_no_line_is_lost_or_changed(tmp_path, tokenizer_model, model):
    tokenizer, seen = Tokenizer(tokenizer_model), Counter()
    for number, generator in inputs("text"):
        is_json = generator.random() < 0.5
        lines = [generator.choice(LINES) for _ in range(generator.randint(1, 6))]
        if is_json:
            content = joined(generator, [damaged_row(generator, {"text": line, "lang": "en"}) for line in lines])
        else:
            raw = [line.encode() for line in lines]
            content = joined(generator, [damaged(generator, r) if generator.random() < 0.4 else r for r in raw])
        path = tmp_path / ("text.jsonl" if is_json else "text.txt")
        with told("text", number, content):
            path.write_bytes(content)
            seen += check(generator, path, content, tmp_path / str(number), tokenizer, model)
    if number > 1000:
        assert min(seen[kind] for kind in ("kept", "blank", "short", "bad")) > number / 50, f"one-sided inputs: {seen}"


def check(
    generator: random.Random, path: Path, content: bytes, folder: Path, tokenizer: Tokenizer, model
) -> Counter[str]:
    limits = generator.choice([(1, 256), (4, 6), (1, 1)])
    folder.mkdir()
    builder = IndexBuilder(folder, COLUMNS)
    scan_text(builder, [path], TextConfig([str(path)], 100, max_tokens=limits[1], min_tokens=limits[0]), tokenizer)
    builder.finish()
    index = Index(folder)
    kept, filtered, bad = plain_rows(content, path.suffix == ".jsonl", model, limits)
    assert sorted((b.file, b.line) for b in index.bad_rows()) == [(str(path), line) for line in bad]
    assert all(b.reason.isprintable() and 0 < len(b.reason) < 300 for b in index.bad_rows())
    assert sum(index.meta["filtered"].values()) == sum(filtered.values())
    reader = TokenReader(folder, tokenizer.dtype)
    pieces: dict[int, list[list[int]]] = {}
    for line, start, length in zip(index.line.tolist(), index.start.tolist(), index.length.tolist(), strict=True):
        pieces.setdefault(line, []).append(reader.read(start, length).tolist())
    assert {line: [*chain(*p)] for line, p in pieces.items()} == dict(kept)
    assert all(len(p) <= limits[1] for line in pieces.values() for p in line)
    for part in folder.iterdir():
        part.unlink()
    folder.rmdir()
    return Counter(kept=len(kept), bad=len(bad), **filtered)
