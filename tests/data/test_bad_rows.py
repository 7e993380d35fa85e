"""Bad rows are listed once, whichever process meets them, and never lost."""

from __future__ import annotations

import json
import multiprocessing

import pytest
from corpus_helpers import write_manifest, write_tone

from nemo_slam.data.bad_rows import BadRow, BadRowError, BadRows, DataError, EmptyStreamError
from nemo_slam.data.config import SpeechConfig
from nemo_slam.data.speech import SpeechStream


def listed(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_listed_once_also_after_a_restart(tmp_path, caplog):
    path = tmp_path / "run" / "bad_rows.jsonl"
    rows = BadRows(path)
    rows.record("speech", BadRow("a.json", 3, "broken"), step=12)
    rows.record("speech", BadRow("a.json", 3, "broken"), step=90)
    rows.record("pairs", BadRow("a.json", 3, "broken"))
    after = BadRows(path)
    after.record("speech", BadRow("a.json", 3, "broken"), step=13)
    after.record("speech", BadRow("a.json", 4, "other"), step=14)
    assert listed(path) == [
        {"stream": "speech", "file": "a.json", "line": 3, "reason": "broken", "step": 12},
        {"stream": "pairs", "file": "a.json", "line": 3, "reason": "broken"},
        {"stream": "speech", "file": "a.json", "line": 4, "reason": "other", "step": 14},
    ]
    assert rows.count() == after.count() == 3  # each knows of the other's
    assert caplog.text.count("a.json:3: broken") == 2
    assert caplog.text.count("a.json:4: other") == 1


def _record_many(path, start):
    rows = BadRows(path)
    for i in range(60):
        rows.record("speech", BadRow("a.json", (start + i) % 60, "broken " + "x" * 200))


def test_processes_do_not_repeat_or_tear_each_others_lines(tmp_path):
    path = tmp_path / "bad_rows.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_record_many, args=(path, 13 * i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(r["line"] for r in listed(path)) == list(range(60))


def test_half_a_line_from_a_kill_harms_nothing(tmp_path):
    path = tmp_path / "bad_rows.jsonl"
    BadRows(path).record("speech", BadRow("a.json", 1, "one"))
    with open(path, "a") as file:
        file.write('{"stream": "speech", "fi')
    rows = BadRows(path)
    rows.record("speech", BadRow("a.json", 1, "one"))
    rows.record("speech", BadRow("a.json", 2, "two"))
    rows.record("speech", BadRow("a.json", 3, "three"))
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["line"] for i in (0, 2, 3)] == [1, 2, 3]
    assert len(lines) == 4
    assert BadRows(path).count() == 3


def test_raise_names_file_and_line():
    with pytest.raises(BadRowError, match=r"a\.json:3: broken \(stream 'speech'; data\.on_bad_row is 'raise'"):
        BadRows(on_bad_row="raise").record("speech", BadRow("a.json", 3, "broken"))


def test_unknown_policy():
    with pytest.raises(DataError, match="'skip' or 'raise', got 'ignore'"):
        BadRows(on_bad_row="ignore")


def test_an_unwritable_list_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "file").touch()
    rows = BadRows(tmp_path / "file" / "bad_rows.jsonl")
    rows.record("speech", BadRow("a.json", 3, "broken"))
    assert "bad rows are only logged" in caplog.text
    assert "a.json:3: broken" in caplog.text


def test_many_bad_rows_do_not_flood_the_log(tmp_path, caplog):
    rows = BadRows(tmp_path / "bad_rows.jsonl")
    rows.record_all("text", [BadRow("a.txt", i, "empty") for i in range(1000)])
    assert len(caplog.records) == 21
    assert "980 more" in caplog.text
    assert len(listed(tmp_path / "bad_rows.jsonl")) == 1000


def test_audio_that_vanishes_altogether_ends_the_run(tmp_path):
    """It must not go on with empty batches, to the end of the schedule."""
    for i in range(6):
        write_tone(tmp_path / "audio" / f"{i}.wav", 1.0)
    rows = [{"audio_filepath": f"audio/{i}.wav", "duration": 1} for i in range(6)]
    stream = SpeechStream(SpeechConfig([str(write_manifest(tmp_path / "m.json", rows))], 200), seed=0)
    assert len(stream.batch(0)) == 2
    (tmp_path / "audio").rename(tmp_path / "elsewhere")
    with pytest.raises(EmptyStreamError, match=r"every row tried is bad \(all 6 rows\).*file system is still there"):
        stream.batch(1)
    (tmp_path / "elsewhere").rename(tmp_path / "audio")
    assert len(stream.batch(1)) == 2
