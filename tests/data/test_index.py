"""Indexes: built once, found again, never trusted when they do not match their sources."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_slam.data import index as index_module
from nemo_slam.data import index_folder
from nemo_slam.data.bad_rows import BadRow, DataError
from nemo_slam.data.config import TextConfig
from nemo_slam.data.index import Index, open_index
from nemo_slam.data.text import TextStream

COLUMNS = {"length": "<i4", "line": "<i4"}


def open_numbers(paths, cache_dir=None, log=None, settings=None):
    """An index of files with a number a line; lines that are no numbers are bad, zeros are filtered."""

    def scan(builder):
        if log is not None:
            with open(log, "a") as file:
                file.write("scan\n")
        for path in paths:
            for number, text in enumerate(path.read_text().split(), 1):
                if not text.isdigit():
                    builder.add_bad(BadRow(str(path), number, f"{text} is no number"))
                elif text == "0":
                    builder.filtered["zeros"] += 1
                else:
                    builder.add(int(text), number)
            builder.end_source()
        builder.meta["note"] = "hello"

    return open_index("numbers", paths, settings or {}, COLUMNS, scan, cache_dir and str(cache_dir))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "corpus" / "a.txt"
    path.parent.mkdir()
    path.write_text("3 1 4 x 1 5 0 9")
    return path


def test_content(source, tmp_path):
    second = source.parent / "b.txt"
    second.write_text("2 6")
    index = open_numbers([source, second])
    assert index.length.tolist() == [3, 1, 4, 1, 5, 9, 2, 6]
    assert index.line.tolist() == [1, 2, 3, 5, 6, 8, 1, 2]
    assert index.shard_offsets.tolist() == [0, 6, 8]  # a shard never crosses a file
    assert index.shard_lengths.tolist() == [23, 8]
    assert len(index) == 8
    assert index.meta["filtered"] == {"zeros": 1}
    assert index.meta["total_length"] == 31
    assert index.meta["note"] == "hello"
    assert index.bad_rows() == [BadRow(str(source), 4, "x is no number")]
    again = pickle.loads(pickle.dumps(index))
    np.testing.assert_array_equal(again.length, index.length)


def test_many_sources_are_asked_at_once(tmp_path, monkeypatch):
    """One after the other, thousands of tar files in an object store would take every rank minutes."""
    paths = [tmp_path / f"{i}.txt" for i in range(8)]
    for i, path in enumerate(paths):
        path.write_text(str(i + 1))
    together = threading.Barrier(len(paths), timeout=30)

    def fingerprint(path):
        together.wait()
        return index_folder.fingerprint(path)

    monkeypatch.setattr(index_module, "fingerprint", fingerprint)
    assert open_numbers(paths).length.tolist() == list(range(1, 9))


def test_shards_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SHARD_ROWS", 4)
    monkeypatch.setattr(index_module, "_FLUSH_ROWS", 8)
    path = tmp_path / "a.txt"
    path.write_text(" ".join(str(i + 1) for i in range(21)))
    index = open_numbers([path])
    assert index.length.tolist() == list(range(1, 22))
    assert index.shard_offsets.tolist() == [0, 4, 8, 12, 16, 20, 21]
    assert index.shard_lengths.tolist() == [10, 26, 42, 58, 74, 21]


def test_built_once(source, tmp_path):
    log = tmp_path / "log"
    first = open_numbers([source], log=log)
    second = open_numbers([source], log=log)
    assert first.folder == second.folder
    assert first.folder.parent == source.parent / ".nemo_slam_index"
    assert log.read_text() == "scan\n"


def test_other_settings_are_another_index(source, tmp_path):
    log = tmp_path / "log"
    folders = {open_numbers([source], log=log, settings={"max": m}).folder for m in (1, 2, 1)}
    assert len(folders) == 2
    assert log.read_text() == "scan\n" * 2


@pytest.mark.parametrize("change", ["content", "length", "time"])
def test_changed_source_is_noticed_and_said(source, caplog, change):
    old = open_numbers([source])
    a_day_ago = time.time() - index_module.KEPT_SECONDS - 1
    os.utime(old.folder, (a_day_ago, a_day_ago))
    before = source.stat()
    source.write_text({"content": "9 1 4 x 1 5 0 9", "length": "3 1", "time": source.read_text()}[change])
    # The same size and time with other bytes must be noticed as well as the same bytes at another time.
    stamp = before.st_mtime_ns + (10**9 if change == "time" else 0)
    os.utime(source, ns=(stamp, stamp))
    new = open_numbers([source])
    assert new.length.tolist() == [int(x) for x in source.read_text().split() if x.isdigit() and x != "0"]
    assert new.folder != old.folder
    assert "does not match its sources any more" in caplog.text
    assert not old.folder.exists()


def test_machines_with_copies_of_other_times_leave_each_other_their_indexes(source, tmp_path):
    """The path, the content and the folder for indexes are shared, the time of the source is each machine's own."""
    log = tmp_path / "log"
    for machine in (1, 2, 1, 2):
        os.utime(source, (machine, machine))
        assert len(open_numbers([source], log=log)) == 6
    assert log.read_text() == "scan\n" * 2


@pytest.mark.parametrize("damage", ["cut", "lost", "meta"])
def test_damaged_index_is_built_anew(source, caplog, damage):
    folder = open_numbers([source]).folder
    if damage == "cut":
        os.truncate(folder / "length.bin", 5)
    elif damage == "lost":
        (folder / "line.bin").unlink()
    else:
        (folder / "meta.json").write_text("{")
    assert open_numbers([source]).length.tolist() == [3, 1, 4, 1, 5, 9]
    assert "is damaged" in caplog.text
    assert open_numbers([source]).folder.exists()


def test_a_failed_or_killed_build_leaves_nothing_that_counts(source):
    def scan(builder):
        builder.add(1, 1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        open_index("numbers", [source], {}, COLUMNS, scan)
    cache = source.parent / ".nemo_slam_index"
    assert not [p for p in cache.iterdir() if p.is_dir()]
    index = open_numbers([source])
    prefix = index.folder.name.rsplit("-", 1)[0]
    killed = cache / f"{prefix}.building-{os.uname().nodename}-{os.getuid()}-12345"
    index.folder.rename(killed)  # what a kill before the rename leaves
    assert len(open_numbers([source])) == 6
    assert not killed.exists()


def test_two_processes_build_once(source, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=open_numbers, args=([source], None, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 4
    assert log.read_text() == "scan\n"


def test_another_machine_may_build_the_same_index_meanwhile(source):
    folder = open_numbers([source]).folder
    aside = source.parent / "aside"
    folder.rename(aside)

    def scan(builder):
        builder.add(7, 1)
        aside.rename(folder)

    index = open_index("numbers", [source], {}, COLUMNS, scan)
    assert index.length.tolist() == [3, 1, 4, 1, 5, 9]
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]


def test_an_index_that_a_network_file_system_shows_late_is_not_removed(source, tmp_path, monkeypatch):
    """Two looks find nothing, before the lock and under it; the third sees what another machine has built."""
    log = tmp_path / "log"
    folder = open_numbers([source], log=log).folder
    looks, real = [], index_module._try_open

    def look(path):
        looks.append(path)
        return real(path) if looks.count(folder) > 2 else None

    monkeypatch.setattr(index_module, "_try_open", look)
    with open(folder / "length.bin") as held:
        assert open_numbers([source], log=log).length.tolist() == [3, 1, 4, 1, 5, 9]
        assert os.fstat(held.fileno()).st_nlink == 1
    assert log.read_text() == "scan\n"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_an_index_that_cannot_be_read_now_is_not_removed(source, monkeypatch, number):
    folder = open_numbers([source]).folder

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(index_module, "check_files", fail)
    with open(folder / "length.bin") as held:
        with pytest.raises(OSError, match=os.strerror(number)):
            open_numbers([source])
        assert os.fstat(held.fileno()).st_nlink == 1


@pytest.mark.skipif(os.getuid() != 0, reason="to be another user takes root")
def test_an_index_that_another_user_keeps_to_himself_is_built_again(monkeypatch):
    above = Path(tempfile.gettempdir())  # pytest's own folders are closed to other users
    if not all(path.stat().st_mode & 0o001 for path in (above, *above.parents)):
        pytest.skip(f"another user cannot enter {above}")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        source = Path(folder) / "a.txt"
        source.write_text("3 1 4 1 5 9")
        own = open_numbers([source]).folder
        own.parent.chmod(0o700)
        cache = Path(folder) / "user"
        cache.mkdir()
        cache.chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        other = multiprocessing.get_context("fork").Process(target=lambda: os.setuid(54321) or open_numbers([source]))
        other.start()
        other.join()
        assert other.exitcode == 0
        assert Index(cache / "nemo_slam" / own.name).length.tolist() == [3, 1, 4, 1, 5, 9]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_passed_over(source, tmp_path, monkeypatch, caplog, number):
    real = fcntl.flock

    def flock(file, operation):
        descriptor = file if isinstance(file, int) else file.fileno()
        if str(source.parent) in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert open_numbers([source]).folder.parent == tmp_path / "user" / "nemo_slam"
    assert os.strerror(number) in caplog.text
    with pytest.raises(DataError, match=rf"{os.strerror(number)}.*cache_dir"):
        open_numbers([source], cache_dir=source.parent / "cache")


def test_others_may_read_the_index(source):
    before = os.umask(0o022)
    try:
        assert open_numbers([source]).folder.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


def test_unwritable_folder_falls_back_to_the_users_cache_and_says_so(source, tmp_path, monkeypatch, caplog):
    (source.parent / ".nemo_slam_index").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert open_numbers([source]).folder.parent == tmp_path / "user" / "nemo_slam"
    assert "cannot write" in caplog.text


def test_a_user_without_a_home_has_no_cache_there(source, tmp_path, monkeypatch):
    """As in a container that runs under any user's number."""
    import pwd

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert open_numbers([source]).folder.parent == source.parent / ".nemo_slam_index"
    assert index_folder.cache_folders(tmp_path)[1:] == [tmp_path / "temporary" / f"nemo_slam_{os.getuid()}"]


def test_a_readable_index_is_used_where_nothing_can_be_written(source, tmp_path, monkeypatch):
    folder = open_numbers([source]).folder
    monkeypatch.setattr(index_folder, "_why_not_writable", lambda folder: "Read-only file system")
    assert open_numbers([source]).folder == folder
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"no writable folder for the index: .*Read-only file system.*cache_dir"):
        open_numbers([source])


def test_unwritable_cache_dir_is_an_error(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file \(File exists\).*cache_dir"):
        open_numbers([source], cache_dir=tmp_path / "file")
    assert open_numbers([source], cache_dir=tmp_path / "new" / "cache").folder.parent == tmp_path / "new" / "cache"


def test_missing_source_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.txt \(No such file or directory\)"):
        open_numbers([tmp_path / "nowhere.txt"])


def test_another_version_is_not_used(source, tmp_path):
    log = tmp_path / "log"
    folder = open_numbers([source], log=log).folder
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "version": 0}))
    open_numbers([source], log=log)
    assert log.read_text() == "scan\n" * 2


def test_another_text_of_the_same_lengths_is_other_data(tmp_path, tokenizer):
    """What a resume compares: the tokens count, where the text lies does not."""
    found = {}
    for folder, words in (("first", ["baden kefal", "mofal"]), ("moved", ["baden kefal", "mofal"]), ("other", None)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("\n".join(words or ["kefal baden", "mofal"]) + "\n")
        found[folder] = TextStream(TextConfig([str(tmp_path / folder / "a.txt")], 100), tokenizer, seed=0).index
    assert found["first"].length.tolist() == found["other"].length.tolist()
    assert found["first"].meta["digest"] == found["moved"].meta["digest"] != found["other"].meta["digest"]
