"""What ptxas makes of the kernels for Ampere, Hopper and Blackwell, on a machine without any of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import INTERPRETED

pytest.importorskip("triton", reason="the Triton kernels need triton (pip install --no-deps triton==3.7.1)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="compilation and interpreter exclude each other in a process"),
]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """Every kernel for every target. Triton caches the results, so that a second run takes seconds."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("ahead_of_time_cases.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_compiles_for_every_target(compiled):
    from_names = {r["kernel"].split()[0] for r in compiled}
    source = Path(__file__).parents[2] / "kernels" / "slam_kernels" / "fused"
    launched = {
        word.split("[")[0].split(".")[-1].strip()
        for file in source.glob("*.py")
        for line in file.read_text().splitlines()
        if "[(" in line and ")](" in line
        for word in [line]
    }
    assert launched == from_names
    for name in from_names:
        assert {r["target"] for r in compiled if r["kernel"].startswith(name)} == {80, 90, 100}, name


def test_nothing_spills(compiled):
    bad = [r for r in compiled if r["spills"] or r["stack"] or r["local"]]
    assert not bad, bad


def test_no_atomics(compiled):
    bad = [r for r in compiled if r["atomics"]]
    assert not bad, bad


def test_registers_stay_under_their_caps(compiled):
    bad = [(r["kernel"], r["target"], r["registers"], r["cap"]) for r in compiled if r["registers"] > r["cap"]]
    assert not bad, bad


def test_hot_loops_move_whole_vectors(compiled):
    bad = [
        (r["kernel"], r["target"], what, r[what], least)
        for r in compiled
        for what, least in r["wanted"].items()
        if r[what] < least
    ]
    assert not bad, bad
    assert sum("loads_16" in r["wanted"] for r in compiled) >= 20
