"""Triton launches on the current device, which need not be that of the tensors: a model on cuda:1 in a notebook."""

from __future__ import annotations

import pytest
import torch
from test_triton_registration import NAMES, operators
from triton.runtime.interpreter import GridExecutor


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_launched_where_the_tensors_are(name, monkeypatch):
    operator, arguments = operators()[name]
    current: list[torch.Tensor] = []
    launched: list[torch.Tensor | None] = []

    class Guard:
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor

        def __enter__(self) -> None:
            current.append(self.tensor)

        def __exit__(self, *_: object) -> None:
            current.pop()

    launch = GridExecutor.__call__

    def recorded(self, *arguments, **options):
        launched.append(current[-1] if current else None)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    operator(*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments))
    assert launched
    assert all(tensor is not None for tensor in launched)
