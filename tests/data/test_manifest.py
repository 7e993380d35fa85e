"""Manifest rows: what is usable, the exact reason where not, and reading by position."""

from __future__ import annotations

import json
import pickle

import pytest

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.manifest import Files, Row, RowError, audio_path, expand_paths, parse_row, scan_lines

GOOD = {"audio_filepath": "a.wav", "duration": 1.5, "text": " hello ", "offset": 2, "lang": "en", "translation": "x"}


def line(**changes) -> bytes:
    row = {**GOOD, **changes}
    return json.dumps({k: v for k, v in row.items() if v is not ...}).encode()


def test_good_row():
    assert parse_row(line(), need_text=True) == Row("a.wav", 1.5, 2.0, "hello", "en")
    assert parse_row(line(offset=..., lang=..., text=...), need_text=False) == Row("a.wav", 1.5)
    assert parse_row(line(offset=None), need_text=False).offset == 0


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"audio_filepath": "a.wav", ', "malformed JSON (Expecting property name"),
        (line() + b" {}", "malformed JSON (Extra data"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"duration": ' + b"1" * 5000 + b"}", "malformed JSON (Exceeds the limit"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at column 13)"),
        (line(audio_filepath=...), "missing key 'audio_filepath'"),
        (line(audio_filepath=7), "audio_filepath must be a string, got 7"),
        (line(audio_filepath=" "), "audio_filepath is empty"),
        (line(duration=...), "missing key 'duration'"),
        (line(duration="1.5"), "duration must be a number of seconds, got '1.5'"),
        (line(duration=True), "duration must be a number of seconds, got True"),
        (line(duration=None), "duration must be a number of seconds, got None"),
        (line(duration=-1), "duration must be above 0, got -1"),
        (line(duration=0), "duration must be above 0, got 0"),
        (line(duration=float("nan")), "duration must be finite, got nan"),
        (line(duration=float("inf")), "duration must be finite, got inf"),
        (line(duration=10**400), "duration must be finite, got inf"),
        (line(offset=-0.5), "offset must be at least 0, got -0.5"),
        (line(offset=float("nan")), "offset must be finite, got nan"),
        (line(text=...), "missing key 'text'"),
        (line(text=None), "text must be a string, got None"),
        (line(text=" \t"), "text is empty"),
        (line(text="\ud800"), "text holds half a surrogate pair"),
    ],
)
def test_bad_rows_and_their_reasons(raw, reason):
    with pytest.raises(RowError) as error:
        parse_row(raw, need_text=True)
    assert str(error.value).startswith(reason)


def test_a_home_that_nobody_has_is_a_folder_that_is_not_there(tmp_path):
    row = parse_row(line(audio_filepath="~no-such-user/x.wav"), need_text=False)
    assert audio_path(tmp_path / "m.json", row) == tmp_path / "~no-such-user" / "x.wav"


def test_lines_are_found_again_by_position(tmp_path):
    rows = ["first", "", "zweite Zeile äöü", "last without a newline"]
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    found = list(scan_lines(path))
    assert [n for n, _, _ in found] == [1, 2, 3, 4]
    files = pickle.loads(pickle.dumps(Files([path])))
    for (_, offset, raw), text in zip(found, rows, strict=True):
        assert raw.decode().rstrip() == text
        assert files.read(0, offset, len(raw)) == raw
    assert files.read(0, found[-1][1], 10_000) == rows[-1].encode()  # stops at the end


def test_few_files_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_slam.data.manifest._OPEN_FILES", 3)
    paths = [tmp_path / f"{i}" for i in range(10)]
    for i, path in enumerate(paths):
        path.write_text(f"file {i}")
    files = Files(paths)
    for i in [*range(10), 0, 9, 1]:
        assert files.read(i, 0, 20) == f"file {i}".encode()
        assert len(files._open) <= 3


def test_ranges_of_shards():
    assert [str(p) for p in expand_paths(["m__OP_8..11_CL_.json"])] == [f"m_{i}.json" for i in range(8, 12)]
    assert [str(p) for p in expand_paths(["a_{00..02}.tar", "b.tar"])] == ["a_00.tar", "a_01.tar", "a_02.tar", "b.tar"]
    assert [str(p) for p in expand_paths(["{0..1}/{0..1}"])] == ["0/0", "0/1", "1/0", "1/1"]
    with pytest.raises(DataError, match="runs backwards"):
        expand_paths(["a_{3..1}.json"])
    with pytest.raises(DataError, match=r"a\.json is listed more than once"):
        expand_paths(["a.json", "b.json", "a.json"])
