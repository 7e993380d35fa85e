"""The measurement of the large model's step: memory of a process and its children, and what a failing run does."""

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "slam_step", Path(__file__).resolve().parents[2] / "benchmarks" / "slam_step.py"
)
slam_step = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(slam_step)

HOLD = "import time; held = bytearray(80 << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(1.5)"
"""80 MiB for a while."""


def test_memory_is_that_of_the_whole_tree():
    both = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {HOLD!r}]); {HOLD}; child.wait()"
    alone, together = (slam_step.measure([sys.executable, "-c", code])[1] / 2**20 for code in (HOLD, both))
    assert 80 < alone < 140
    assert alone + 80 < together < 280


def test_a_run_that_fails_is_no_result():
    with pytest.raises(SystemExit, match="the run ended with status 3"):
        slam_step.measure([sys.executable, "-c", "raise SystemExit(3)"])
