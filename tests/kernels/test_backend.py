"""The choice of backend: `auto` picks, an explicit choice that cannot be had is an error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETED
from kernel_batches import layout

from slam_kernels import BackendError, resolve, sample_spans, triton_unavailable
from slam_kernels import backend as backend_module


def test_auto_and_torch_on_the_cpu():
    assert resolve("auto", "cpu") == "torch"
    assert resolve("torch", torch.device("cpu")) == "torch"


def test_unknown_choice():
    with pytest.raises(ValueError, match="expected one of auto, triton, torch"):
        resolve("cuda", "cpu")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the kernels on the CPU")
def test_triton_on_the_cpu_is_an_error():
    with pytest.raises(BackendError, match="need an NVIDIA GPU"):
        resolve("triton", "cpu")
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(BackendError, match="sample_spans: backend='triton' on cpu"):
        sample_spans(layout([9]), ids, ids, key=1, span=2, rate=0.5, num_rows=9, backend="triton")


def test_missing_triton_is_an_error_and_auto_falls_back(monkeypatch):
    monkeypatch.setattr(backend_module, "_INSTALLED", False)
    assert "not installed" in triton_unavailable("cuda")
    assert resolve("auto", "cuda") == "torch"
    with pytest.raises(BackendError, match="not installed"):
        resolve("triton", "cuda")


def test_import_loads_neither_triton_nor_nemo():
    code = "import sys, slam_kernels; print([m for m in ('triton', 'nemo', 'nemo_slam') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
