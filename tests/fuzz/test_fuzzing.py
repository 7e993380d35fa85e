"""The fuzzer itself: the same inputs again, and a failure that names the one it came from."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import checked, damaged, damaged_row, in_groups, inputs, joined


def test_the_same_number_gives_the_same_input():
    def some() -> list[bytes]:
        return [damaged(generator, b"hello world") for _, generator in inputs("index")]

    assert some() == some()
    assert len(set(some())) > 0.5 * len(some())
    grouped = [number for _, group in in_groups("index") for number, _ in group]
    assert grouped == [number for number, _ in inputs("index")]


def test_about_half_of_the_rows_stay_whole():
    row = {"audio_filepath": "a.wav", "duration": 1.5}
    rows = [damaged_row(random.Random(i), row) for i in range(400)]
    whole = sum(line == json.dumps(row).encode() for line in rows)
    assert 120 < whole < 280
    assert joined(random.Random(0), rows).count(b"\n") >= 398


def test_a_failure_names_the_input(tmp_path):
    def check(files: dict[Path, bytes]) -> Counter[str]:
        (tmp_path / "index").mkdir()
        assert all(path.read_bytes() == content for path, content in files.items())
        if b"poison" in b"".join(files.values()):
            raise IndexError("out of range")
        return Counter(fine=len(files))

    files = {tmp_path / f"{i}.json": b"fine" for i in range(5)}
    assert checked("manifest", check, files)["fine"] == 5
    with pytest.raises(AssertionError, match=r"FUZZ_ONLY=3 pytest tests/fuzz -k manifest\nIndexError: out of range"):
        checked("manifest", check, {**files, tmp_path / "3.json": b"poison"})
    assert not list(tmp_path.iterdir())
