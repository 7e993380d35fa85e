"""Whole files, the lock, the marker, and a preparation that is killed, repeated or called twice at once."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from nemo_slam.data.corpora import layout, prepare
from nemo_slam.data.corpora.files import CorpusError, locked, read_marker, whole_file, write_text
from nemo_slam.data.corpora.layout import finish, prepare_once

REQUEST = {"version": 1}


def _row(text: str) -> dict:
    return {"audio_filepath": "../audio/x.wav", "duration": 1.0, "text": text, "lang": "en", "prompt_id": text}


def _finish(root: Path, request: dict = REQUEST) -> None:
    rows = {"en": {"train": [_row("one two")], "dev": [_row("three")], "test": [_row("four")]}}
    finish(root, rows, ["a line", "another line"], {"name": "tiny", "request": request}, Counter())


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def write_half():
        with whole_file(target) as temporary:
            temporary.write_text("new, but")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_replaced_and_never_rewritten_in_place(tmp_path):
    target, reader = tmp_path / "file.txt", tmp_path / "open_elsewhere"
    write_text(target, "old")
    os.link(target, reader)
    write_text(target, "new")
    assert (target.read_text(), reader.read_text()) == ("new", "old")


def test_a_killed_preparation_leaves_nothing_a_rerun_trusts(tmp_path):
    """SIGKILL in the middle of a manifest: no manifest of that name, no marker; the rerun cleans up and completes."""
    script = f"""
import os, signal
from pathlib import Path
from nemo_slam.data.corpora.files import whole_file
from nemo_slam.data.corpora.layout import prepare_once
root = Path({str(tmp_path)!r})
def build():
    (root / "text").mkdir(parents=True)
    (root / "text" / "train.txt").write_text("written by the killed one\\n")
    with whole_file(root / "manifests" / "en_train.json") as temporary:
        temporary.write_text('{{"half": ')
        os.kill(os.getpid(), signal.SIGKILL)
prepare_once(root, "tiny", {REQUEST!r}, build)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "manifests" / "en_train.json").exists()
    assert list(tmp_path.rglob(".partial-*"))
    assert read_marker(tmp_path) is None

    (tmp_path / ".partial-marker").write_text("as a kill in the last file leaves it")
    prepare_once(tmp_path, "tiny", REQUEST, lambda: _finish(tmp_path))
    assert not list(tmp_path.rglob(".partial-*"))
    assert "killed" not in (tmp_path / "text" / "train.txt").read_text()
    assert json.loads((tmp_path / "manifests" / "en_train.json").read_text())["text"] == "one two"
    assert read_marker(tmp_path)["speech"]["en"]["train"]["utterances"] == 1


@pytest.mark.parametrize("damage", ["truncated marker", "missing manifest", "marker of another type"])
def test_a_damaged_corpus_is_prepared_again(tmp_path, damage):
    prepare_once(tmp_path, "tiny", REQUEST, lambda: _finish(tmp_path))
    marker = tmp_path / "corpus.json"
    if damage == "truncated marker":
        marker.write_text(marker.read_text()[:40])
    elif damage == "marker of another type":
        marker.write_text("[]")
    else:
        (tmp_path / "manifests" / "speech_dev.json").unlink()
    calls = []
    prepare_once(tmp_path, "tiny", REQUEST, lambda: (calls.append(1), _finish(tmp_path)))
    assert calls == [1]
    prepare_once(tmp_path, "tiny", REQUEST, lambda: calls.append(2))
    assert calls == [1]


def test_another_request_prepares_anew_and_drops_what_was_made_from_the_old_text(tmp_path):
    prepare_once(tmp_path, "tiny", REQUEST, lambda: _finish(tmp_path))
    (tmp_path / "tokenizers" / "spm_8").mkdir(parents=True)
    (tmp_path / "manifests" / "es_train.json").write_text("{}")
    other = {"version": 2}
    prepare_once(tmp_path, "tiny", other, lambda: _finish(tmp_path, other))
    assert read_marker(tmp_path)["request"] == other
    assert not (tmp_path / "tokenizers").exists()
    assert not (tmp_path / "manifests" / "es_train.json").exists()


def test_the_old_marker_is_gone_before_a_new_preparation_writes(tmp_path):
    """Else it would vouch for the files of one that is killed before its own marker."""
    prepare_once(tmp_path, "tiny", REQUEST, lambda: _finish(tmp_path))
    seen = []
    prepare_once(tmp_path, "tiny", {"version": 2}, lambda: seen.append((tmp_path / "corpus.json").exists()))
    assert seen == [False]


def test_a_request_that_leaves_something_open_takes_what_is_there(tmp_path):
    built = {"languages": ["en"], "version": 1}
    prepare_once(tmp_path, "tiny", built, lambda: _finish(tmp_path, built))
    calls = []
    prepare_once(tmp_path, "tiny", {"languages": None, "version": 1}, lambda: calls.append("open"))
    assert calls == []
    prepare_once(tmp_path, "tiny", {"languages": None, "version": 2}, lambda: calls.append("version"))
    assert calls == ["version"]


def test_another_corpus_in_the_folder_is_an_error_and_stays(tmp_path):
    prepare_once(tmp_path, "tiny", REQUEST, lambda: _finish(tmp_path))
    with pytest.raises(CorpusError, match="holds corpus 'tiny', not 'other'"):
        prepare_once(tmp_path, "other", REQUEST, lambda: None)
    assert read_marker(tmp_path)["name"] == "tiny"


def test_a_failed_build_leaves_no_marker(tmp_path):
    def build():
        raise CorpusError("no network")

    with pytest.raises(CorpusError, match="no network"):
        prepare_once(tmp_path, "tiny", REQUEST, build)
    assert read_marker(tmp_path) is None


def _prepare_slowly(root: Path, start: float) -> None:
    def build():
        with (root / "builds").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        _finish(root)

    time.sleep(max(0.0, start - time.time()))
    prepare_once(root, "tiny", REQUEST, build)
    assert read_marker(root) is not None


def test_processes_that_prepare_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    start = time.time() + 1.5
    processes = [context.Process(target=_prepare_slowly, args=(tmp_path, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "builds").read_text().splitlines()) == 1


def test_an_unknown_corpus_names_the_known(tmp_path):
    with pytest.raises(ValueError, match="expected one of prompts, mini_librispeech, synthetic"):
        prepare("librispeach", tmp_path)


@pytest.mark.parametrize("marker", [None, '{"name": "mine"}', "mine"])
def test_folders_that_no_preparation_made_are_not_removed(tmp_path, marker):
    if marker is not None:
        (tmp_path / "corpus.json").write_text(marker)
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "mine.wav").write_bytes(b"")
    with pytest.raises(CorpusError, match="holds audio, which no preparation made"):
        prepare_once(tmp_path, "tiny", REQUEST, lambda: _finish(tmp_path))
    assert (tmp_path / "audio" / "mine.wav").exists()


def test_a_folder_without_locks_or_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with (
        pytest.raises(CorpusError, match=r"file: nothing can be prepared there.*File exists"),
        locked(tmp_path / "file", "x"),
    ):
        pass

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(CorpusError, match=r"root: nothing can be prepared there.*No locks available"):
        prepare_once(tmp_path / "root", "tiny", REQUEST, lambda: None)


def test_a_corpus_that_a_network_file_system_shows_late_is_not_removed(tmp_path, monkeypatch):
    """Names are looked up anew when this machine has changed the folder, as by a client of NFS."""
    prepare_once(tmp_path, "tiny", REQUEST, lambda: _finish(tmp_path))
    before = tmp_path.stat().st_mtime_ns

    def look(root):
        return read_marker(root) if root.stat().st_mtime_ns != before else None

    monkeypatch.setattr(layout, "read_marker", look)
    prepare_once(tmp_path, "tiny", REQUEST, lambda: pytest.fail("prepared again"))
    assert (tmp_path / "manifests" / "speech_train.json").exists()
