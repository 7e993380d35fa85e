"""Who waits for another process's lock says so, once, and names the file."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from contextlib import contextmanager

import pytest
from corpus_helpers import write_manifest
from filelock import FileLock, SoftFileLock, Timeout

from nemo_slam.data import locks
from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.corpora.files import locked
from nemo_slam.data.index import open_index
from nemo_slam.data.sharding import ShardSettings, make_shards


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(locks, "SAID_AFTER_SECONDS", 0.2)


@contextmanager
def held_elsewhere(path, caplog):
    """As if by another process: the kernel knows a lock by the opened file. Given up after it was waited for."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield given_up_when_said(caplog, lambda: fcntl.flock(file, fcntl.LOCK_UN))


def given_up_when_said(caplog, give_up) -> threading.Thread:
    def watch():
        for _ in range(400):
            if "waiting" in caplog.text:
                break
            threading.Event().wait(0.05)
        threading.Event().wait(0.5)  # time to say it again
        give_up()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def said(caplog) -> str:
    (record,) = [record for record in caplog.records if "waiting" in record.getMessage()]
    assert record.levelname == "WARNING"
    return record.getMessage()


def test_the_builder_of_an_index_is_waited_for(tmp_path, caplog):
    source = tmp_path / "a.txt"
    source.touch()

    def open_it():
        return open_index("numbers", [source], {}, {"length": "<i4"}, lambda builder: builder.add(1))

    folder = open_it().folder
    (lock,) = folder.parent.glob("*.lock")
    shutil.rmtree(folder)
    with held_elsewhere(lock, caplog):
        assert len(open_it()) == 1
    assert f"builds the index {folder}; it holds the lock {lock}" in said(caplog)


def test_a_long_wait_asks_seldom():
    """Hundreds of ranks wait for one that builds, on the same file system."""
    asked = []

    class Held:
        lock_file = "a.lock"

        def acquire(self, timeout: float = -1, poll_interval: float = 0.05) -> str:
            asked.append((timeout, poll_interval))
            if timeout >= 0:
                raise Timeout(self.lock_file)
            return "taken"

    assert locks.acquire(Held(), "works") == "taken"
    assert asked == [(0.2, 0.05), (-1, 1.0)]


def test_the_preparation_of_a_corpus_is_waited_for(tmp_path, caplog):
    with held_elsewhere(tmp_path / ".prepare.lock", caplog), locked(tmp_path, "prepare"):
        pass
    assert said(caplog).endswith(f"prepares {tmp_path}; it holds the lock {tmp_path}/.prepare.lock")


def test_what_stands_for_a_lock_may_be_removed(tmp_path, caplog, monkeypatch):
    """On a file system without locks, of which Lustre may be one, filelock makes do with a file."""

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    ready, over = threading.Event(), threading.Event()

    def hold():
        with SoftFileLock(tmp_path / "a.lock"):
            ready.set()
            over.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait(30)
    given_up_when_said(caplog, over.set)
    with pytest.warns(UserWarning, match="flock"), locks.acquire(FileLock(tmp_path / "a.lock"), "works"):
        pass
    assert "a mere file" in said(caplog)
    assert "remove it" in said(caplog)
    holder.join()


def test_a_lock_that_is_free_is_taken_in_silence(tmp_path, caplog):
    for _ in range(2):  # the first one is given back
        with locks.acquire(FileLock(tmp_path / "a.lock"), "works"):
            pass
    assert caplog.text == ""


def test_shards_that_another_process_makes_name_the_lock(tmp_path, caplog):
    write_manifest(tmp_path / "a.jsonl", [{"audio_filepath": "a.wav", "duration": 1.0}])
    with open(tmp_path / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=rf"making shards there; it holds {tmp_path}/\.lock"):
            make_shards([tmp_path / "a.jsonl"], tmp_path, ShardSettings(1), workers=1)
