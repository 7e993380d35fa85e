"""Activation checkpointing and compiled layers: the same numbers, less memory, nothing compiled twice."""

from __future__ import annotations

import numpy as np
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from nemo_slam.modules.conformer import ConformerConfig, ConformerStack
from nemo_slam.packing import SequenceLayout

SMALL = {"d_model": 32, "d_ff": 64, "n_heads": 2, "conv_norm_groups": 4}


def stack(layers=2, **changes) -> ConformerStack:
    torch.manual_seed(0)
    return ConformerStack(ConformerConfig(**{**SMALL, **changes}), layers)


def run(module, lengths):
    layout = SequenceLayout.build(np.array(lengths), multiple=16)
    torch.manual_seed(1)
    rows = torch.randn(layout.num_rows, 32, requires_grad=True)
    out = module(rows, layout)
    valid = out[: layout.num_valid]
    # A layer ends in a LayerNorm, whose output has nearly the same sum of squares whatever comes in.
    (valid * torch.randn(valid.shape)).sum().backward()
    grads = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    return [valid.detach(), rows.grad[: layout.num_valid], *grads]


def test_checkpointing_changes_no_number_dropout_included():
    for ours, expected in zip(
        run(stack(dropout=0.3, activation_checkpointing=True), [5, 40, 17]),
        run(stack(dropout=0.3), [5, 40, 17]),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_checkpointing_keeps_less():
    def kept(module):
        layout = SequenceLayout.build(np.array([60, 60]), multiple=16)
        bytes_kept = 0

        def pack(tensor):
            nonlocal bytes_kept
            if not isinstance(tensor, torch.nn.Parameter):
                bytes_kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(torch.randn(layout.num_rows, 32, requires_grad=True), layout)
        return bytes_kept

    assert kept(stack(activation_checkpointing=True)) < 0.1 * kept(stack())


def test_what_is_compiled_serves_every_batch_and_every_layer(monkeypatch):
    """Other numbers of rows and sequences, other blocks, more layers: nothing is compiled again."""
    compile_ = torch.compile
    counts = []
    for layers in (3, 6):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        monkeypatch.setattr(torch, "compile", lambda *a, c=counter, **k: compile_(*a, **{**k, "backend": c}))
        ours, plain = stack(layers=layers, dropout=0.0, compile=True), stack(layers=layers, dropout=0.0)
        after = []
        for lengths in ([5, 40, 17], [3, 3], [90], [1, 2, 3, 4, 5, 6, 7, 60], [33, 31, 12]):
            for result, expected in zip(run(ours, lengths), run(plain, lengths), strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
            after.append(counter.frame_count)
        assert after[0] >= 1
        assert after == after[:1] * len(after)
        counts.append(after[0])
        assert list(ours.state_dict()) == list(plain.state_dict())
    assert counts[0] == counts[1]
    torch._dynamo.reset()
