"""The operators' tests run twice: on the PyTorch twins, and, in a process of their own, on the Triton kernels.

Triton's interpreter must be chosen before triton is first imported. So with ``TRITON_INTERPRET=1`` in the environment
the fixture `backend` is "triton", and test_under_interpreter.py starts these same files again in such a process.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
BACKEND = "triton" if INTERPRETED else "torch"
collect_ignore_glob = [] if INTERPRETED else ["test_triton_*.py"]


@pytest.fixture
def backend() -> str:
    return BACKEND


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Whatever ``torch.empty`` gives is NaN or the largest integer: an element that no kernel wrote shows at once."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
