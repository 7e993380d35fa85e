"""A stand-in for Transformer Engine, and a GPU that is not there."""

from __future__ import annotations

import pytest
import te_stand_in
import torch


@pytest.fixture
def transformer_engine(monkeypatch):
    """The stand-in, used on the CPU; gives its record of what happened."""
    state = te_stand_in.install(monkeypatch)
    yield state
    te_stand_in.clear_caches()


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A function that makes torch report a GPU of a compute capability."""
    te_stand_in.clear_caches()

    def pretend(capability: tuple[int, int]) -> torch.device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        te_stand_in.clear_caches()
        return torch.device("cuda", 0)

    yield pretend
    te_stand_in.clear_caches()
