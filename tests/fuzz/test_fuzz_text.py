"""Damaged text files: every line is tokenised as SentencePiece alone does it, filtered and counted, or listed."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import sentencepiece
from fuzzing import checked, damaged, damaged_row, in_groups, joined

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
    for common, group in in_groups("text"):
        files = {}
        for number, generator in group:
            lines = [generator.choice(LINES) for _ in range(generator.randint(1, 6))]
            if generator.random() < 0.5:
                path = tmp_path / f"{number}.jsonl"
                files[path] = joined(generator, [damaged_row(generator, {"text": s, "lang": "en"}) for s in lines])
            else:
                raw = [line.encode() for line in lines]
                raw = [damaged(generator, r) if generator.random() < 0.4 else r for r in raw]
                files[tmp_path / f"{number}.txt"] = joined(generator, raw)
        limits = common.choice([(1, 256), (4, 6), (1, 1)])
        run = partial(check, folder=tmp_path / "index", limits=limits, tokenizer=tokenizer, model=model)
        seen += checked("text", run, files)
    if sum(seen.values()) > 1000:
        assert min(seen[kind] for kind in ("kept", "blank", "short", "bad")) > 100, f"the inputs are one-sided: {seen}"


def check(files: dict[Path, bytes], folder: Path, limits: tuple[int, int], tokenizer: Tokenizer, model) -> Counter[str]:
    folder.mkdir()
    builder = IndexBuilder(folder, COLUMNS)
    paths = [*files]
    config = TextConfig([str(path) for path in paths], 100, max_tokens=limits[1], min_tokens=limits[0])
    scan_text(builder, paths, config, tokenizer)
    builder.finish()
    index = Index(folder)
    kept, filtered, bad = {}, Counter(), []
    for file, (path, content) in enumerate(files.items()):
        own, left_out, refused = plain_rows(content, path.suffix == ".jsonl", model, limits)
        kept |= {(file, line): tokens for line, tokens in own}
        filtered += left_out
        bad += [(str(path), line) for line in refused]
    assert sorted((b.file, b.line) for b in index.bad_rows()) == sorted(bad)
    assert all(b.reason.isprintable() and 0 < len(b.reason) < 300 for b in index.bad_rows())
    assert sum(index.meta["filtered"].values()) == sum(filtered.values())
    reader = TokenReader(folder, tokenizer.dtype)
    pieces: dict[tuple[int, int], list[list[int]]] = {}
    columns = (getattr(index, name).tolist() for name in ("file", "line", "start", "length"))
    for file, line, start, length in zip(*columns, strict=True):
        pieces.setdefault((file, line), []).append(reader.read(start, length).tolist())
    assert {line: [*chain(*p)] for line, p in pieces.items()} == kept
    assert all(len(p) <= limits[1] for line in pieces.values() for p in line)
    return Counter(kept=len(kept), bad=len(bad), **filtered)
