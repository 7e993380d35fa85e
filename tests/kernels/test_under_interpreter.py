"""Runs the operators' tests on the Triton kernels: a process a file, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import INTERPRETED

HERE = Path(__file__).parent
FILES = (
    "test_glu_conv_group_norm_silu.py",
    "test_sample_spans.py",
    "test_span_noise.py",
    "test_span_contrastive.py",
    "test_masked_cross_entropy.py",
    "test_triton_registration.py",
    "test_triton_addresses.py",
    "test_triton_device.py",
)

pytest.importorskip("triton", reason="the Triton kernels need triton (pip install --no-deps triton==3.7.1)")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process is one of those it would start")
@pytest.mark.parametrize("file", FILES)
def test_kernels_pass(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
