"""A loader that hands over nothing for long is reported, again and again, and otherwise changes nothing."""

from __future__ import annotations

import threading
import time

import pytest

from nemo_slam.training import data_module
from nemo_slam.training.data_module import told_when_slow


@pytest.fixture
def warnings(monkeypatch):
    found: list[str] = []
    monkeypatch.setattr(data_module.logging, "warning", found.append)
    return found


def test_a_wait_is_reported_while_it_lasts(warnings):
    def batches():
        yield 1
        deadline = time.monotonic() + 60
        while len(warnings) < 3 and time.monotonic() < deadline:  # hangs until it has been said three times
            time.sleep(0.01)
        yield 2

    assert list(told_when_slow(batches(), 0.2)) == [1, 2]
    assert len(warnings) >= 3
    assert all("no batch for" in text and "data.num_workers=0" in text for text in warnings)


def test_a_slow_trainer_is_not_the_loaders_fault(warnings):
    for _ in told_when_slow([1, 2, 3], 0.1):
        time.sleep(0.3)
    assert not warnings


def test_errors_pass_and_the_thread_ends(warnings):
    def batches():
        yield 1
        raise OSError("no room")

    before = threading.active_count()
    with pytest.raises(OSError, match="no room"):
        list(told_when_slow(batches(), 0.05))
    left = told_when_slow([1, 2], 0.05)
    assert next(left) == 1
    left.close()  # as a run does that ends before its loader
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
