"""Damaged manifests: every line is a row as plain JSON reads it, filtered and counted, or listed with its line."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fuzzing import VALUES, checked, damaged_row, in_groups, joined

from nemo_slam.data.audio_rows import COLUMNS, scan_audio_rows
from nemo_slam.data.bad_rows import BadRows
from nemo_slam.data.config import SpeechConfig
from nemo_slam.data.index import Index, IndexBuilder
from nemo_slam.data.manifest import Files, Row, parse_row
from nemo_slam.data.speech import SpeechStream

ROWS = [
    {"audio_filepath": "a.wav", "duration": 1.5, "text": "one two", "lang": "en"},
    {"audio_filepath": "b/ü.flac", "duration": 2, "offset": 0.25, "text": " drei ", "lang": "de", "speaker": None},
    {"audio_filepath": "~/c.wav", "duration": 0.29, "offset": None, "text": "x"},
    {"audio_filepath": "/d.wav", "duration": 20.5, "text": "\u4e00\u4e8c", "lang": 7},
]
LIMITS = [(0.3, 20.0), (0.0, 1e9), (0.0, math.inf), (1.0, 1.0)]
LONGEST = 20_000_000  # seconds; what is longer cannot be counted in frames of 32 bits


# ---- the oracle: json, and the rules as docs/data.md states them ---------------------------------------


def plain_row(line: bytes, need_text: bool) -> Row | None:
    """The row that a line holds, or None if it cannot be used."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not text_of(row, "audio_filepath") or (need_text and not text_of(row, "text")):
        return None
    numbers = [row.get("duration"), 0 if row.get("offset") is None else row["offset"]]
    if not all(type(n) in (int, float) and 0 <= n <= LONGEST for n in numbers) or numbers[0] == 0:
        return None
    lang = row.get("lang")
    text = row["text"].strip() if need_text else ""
    return Row(row["audio_filepath"], *map(float, numbers), text, lang if isinstance(lang, str) else "")


def text_of(row: dict, key: str) -> bool:
    value = row.get(key)
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def plain_lines(content: bytes) -> list[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not blank."""
    found, offset = [], 0
    for number, line in enumerate(content.split(b"\n"), 1):
        mark = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
        if line[mark:].strip():
            found.append((number, offset + mark, line[mark:]))
        offset += len(line) + 1
    return found


def test_the_oracle_can_tell():
    assert plain_row(b'{"audio_filepath": "a", "duration": 1, "text": " b "}', True) == Row("a", 1.0, 0.0, "b")
    for bad in (b"[1]", b"{", b'{"audio_filepath": "a", "duration": NaN}', b'{"audio_filepath": "", "duration": 1}'):
        assert plain_row(bad, False) is None
    assert plain_lines(b"\xef\xbb\xbfa\n\n b\n") == [(1, 3, b"a"), (3, 6, b" b")]


# ---- the tests -----------------------------------------------------------------------------------


def test_no_row_is_lost_or_changed(tmp_path):
    seen: Counter[str] = Counter()
    for common, group in in_groups("manifest"):
        files = {}
        for number, generator in group:
            rows = [generator.choice(ROWS) for _ in range(generator.randint(1, 6))]
            content = joined(generator, [damaged_row(generator, row) for row in rows])
            files[tmp_path / f"{number}.json"] = content
        options = {"need_text": common.random() < 0.5, "limits": common.choice(LIMITS)}
        seen += checked("manifest", partial(check, folder=tmp_path / "index", **options), files)
    if sum(seen.values()) > 1000:
        assert min(seen[kind] for kind in ("kept", "filtered", "bad")) > 100, f"the inputs are one-sided: {seen}"


def check(files: dict[Path, bytes], folder: Path, need_text: bool, limits: tuple[float, float]) -> Counter[str]:
    paths, (shortest, longest) = [*files], limits
    folder.mkdir()
    builder = IndexBuilder(folder, COLUMNS)
    config = SpeechConfig([str(path) for path in paths], 100, min_duration=shortest, max_duration=longest)
    read: list[Row] = []
    for chunk in scan_audio_rows(builder, paths, config, need_text, None):
        for row, values in chunk:
            read.append(row)
            builder.add(*values)
    builder.finish()
    index = Index(folder)

    kept, filtered, bad = [], 0, []
    for file, (path, content) in enumerate(files.items()):
        for line, offset, raw in plain_lines(content):
            row = plain_row(raw, need_text)
            if row is None:
                bad.append((str(path), line))
            elif shortest <= row.duration <= longest:
                kept.append((row, file, line, offset))
            else:
                filtered += 1
    assert read == [row for row, _, _, _ in kept]
    assert [*zip(*(getattr(index, c).tolist() for c in ("file", "line", "offset")), strict=True)] == [
        k[1:] for k in kept
    ]
    assert np.array_equal(index.length, [max(1, round(row.duration * 100)) for row in read])
    assert sum(index.meta["filtered"].values()) == filtered
    assert [(b.file, b.line) for b in index.bad_rows()] == bad
    assert all(b.reason.isprintable() and 0 < len(b.reason) < 300 for b in index.bad_rows())
    reader = Files(paths)  # and each row is found again by its position
    places = zip(*(getattr(index, c).tolist() for c in ("file", "offset", "nbytes")), strict=True)
    assert [parse_row(reader.read(*place), need_text) for place in places] == read
    reader.close()
    return Counter(kept=len(kept), filtered=filtered, bad=len(bad))


@pytest.mark.parametrize("key", ["audio_filepath", "duration", "offset"])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:12])
def test_a_strange_value_is_refused_or_read_and_never_stops_a_stream(tmp_path, key, value):
    """Of the whole stream: the row beside the good one is read, filtered, or listed with its line."""
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.25, np.float32), 16000, subtype="FLOAT")
    good = {"audio_filepath": "a.wav", "duration": 1.0}
    (tmp_path / "m.json").write_text(json.dumps(good) + "\n" + json.dumps({**good, key: value}) + "\n")
    bad = BadRows(tmp_path / "bad.jsonl")
    config = SpeechConfig([str(tmp_path / "m.json")], 100, min_duration=0.0, max_duration=math.inf)
    stream = SpeechStream(config, seed=0, bad_rows=bad)
    ids = np.arange(len(stream.index))
    batch = stream.load(ids, np.zeros_like(ids))
    assert batch.ids.tolist()[-1:] == [0] or 0 in batch.ids
    assert (batch.audio[batch.ids.tolist().index(0), :16000] == 0.25).all()
    lines = [json.loads(line) for line in bad.path.read_text().splitlines()] if bad.path.exists() else []
    assert len(batch) + len(lines) == 2
    assert all(row["line"] == 2 and row["reason"] for row in lines)
