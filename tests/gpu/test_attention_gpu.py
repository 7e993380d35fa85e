"""Attention, compiled layers, the optimizer and a whole step on a GPU, without Transformer Engine."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "modules"))
from attention_oracle import attention

from nemo_slam.modules.attention_backends import AttentionSettings, resolve_backend, sdpa, varlen
from nemo_slam.modules.conformer import ConformerConfig, ConformerStack
from nemo_slam.packing import SequenceLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LENGTHS = [700, 0, 1, 64, 65, 333, 17]


def packed(heads: int, size: int):
    layout = SequenceLayout.build(np.array(LENGTHS), "cuda", multiple=16)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.num_rows, 3, heads, size, generator=generator)
    weight = torch.randn(layout.num_valid, heads, size, generator=generator)
    return layout, qkv, weight


def run(function, layout, qkv, weight, dtype):
    leaf = qkv.to("cuda", dtype).requires_grad_()
    out = function(leaf, layout, 0.0)
    assert torch.isfinite(out).all()
    (grad,) = torch.autograd.grad((out[: layout.num_valid] * weight.to("cuda", dtype)).sum(), leaf)
    return out[: layout.num_valid].double().cpu(), grad[: layout.num_valid].double().cpu()


@pytest.mark.parametrize("size", [36, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_attention_errs_no_more_than_blocks_do(size, dtype):
    """At most twice the error of PyTorch's fused attention on blocks, in the same precision."""
    layout, qkv, weight = packed(2, size)
    settings = AttentionSettings("auto", "none", 2, size)
    if size % 8:
        assert resolve_backend(settings, torch.device("cuda", 0), dtype) == "sdpa"
        return
    assert resolve_backend(settings, torch.device("cuda", 0), dtype) == "varlen"
    low = qkv.to(dtype).double().requires_grad_()
    exact = attention(low, LENGTHS)
    (exact_grad,) = torch.autograd.grad((exact * weight.to(dtype).double()).sum(), low)
    exact_grad = exact_grad[: layout.num_valid]
    ours, blocks = (run(function, layout, qkv, weight, dtype) for function in (varlen, sdpa))
    for result, stock, expected in zip(ours, blocks, (exact, exact_grad), strict=True):
        error, usual = ((x - expected).abs().max().item() for x in (result, stock))
        assert error <= 2 * usual + 1e-4, (error, usual)


def stack(**changes) -> ConformerStack:
    torch.manual_seed(0)
    small = {"d_model": 256, "d_ff": 512, "n_heads": 2, "conv_norm_groups": 8, "dropout": 0.0}
    return ConformerStack(ConformerConfig(**{**small, **changes}), 2).cuda()


def step(module, lengths, dtype=torch.bfloat16):
    layout = SequenceLayout.build(np.array(lengths), "cuda", multiple=128)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(layout.num_rows, 256, generator=generator).cuda().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = module(rows, layout)
    valid = out[: layout.num_valid].float()
    # A layer ends in a LayerNorm, whose output has nearly the same sum of squares whatever comes in.
    (valid * torch.randn(valid.shape, generator=generator).cuda()).mean().backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    module.zero_grad()
    return valid.detach(), rows.grad[: layout.num_valid], grads


def relative(a, b) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"compile": True}])
def test_switches_change_no_number(changes):
    plain, ours = stack(), stack(**changes)
    for lengths in ([300, 40, 17], [3, 3], [500, 20]):
        for result, expected in zip(step(ours, lengths), step(plain, lengths), strict=True):
            assert relative(result, expected) < 0.02


def test_checkpointing_lowers_the_peak():
    def peak(module):
        step(module, [900] * 4)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(module, [900] * 4)
        return torch.cuda.max_memory_allocated() - before

    assert peak(stack(activation_checkpointing=True)) < 0.75 * peak(stack())


def test_compiled_layers_are_compiled_for_any_batch():
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    module = stack(compile=True)
    step(module, [300, 40, 17])
    step(module, [30, 41, 170, 5])
    before = counters["stats"]["unique_graphs"]
    for lengths in ([500, 20], [7] * 20, [129]):
        step(module, lengths)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_adamw_steps_as_on_a_cpu(weight_decay):
    from nemo_slam.training.optimizers import FastestAdamW, implementation

    assert "AdamW, fused" in implementation("auto", torch.device("cuda")) or "apex" in implementation(
        "auto", torch.device("cuda")
    )
    weights = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(64).to(device))
        optimizer = FastestAdamW([parameter], lr=1e-2, weight_decay=weight_decay)
        for k in range(5):
            parameter.grad = torch.sin(torch.arange(64.0) + k).to(device)
            optimizer.step()
        weights[device] = parameter.detach().cpu()
    torch.testing.assert_close(weights["cuda"], weights["cpu"], rtol=1e-5, atol=1e-6)


def test_a_whole_step_has_the_losses_of_a_cpu(model_config, make_batch):
    """All objectives, Triton's kernels and bfloat16 beside PyTorch's operators and float32 on the CPU."""
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    torch.manual_seed(0)
    model = SLAMPretrainingModel(model_config())
    batch = make_batch(speech=[1.0, 3.0, 7.5])
    expected = {loss.name: (float(loss.total), float(loss.count)) for loss in model.losses(batch)[1].losses}
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        total, result, _ = model.losses(batch.to("cuda"))
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for loss in result.losses:
        value, count = expected[loss.name]
        assert float(loss.count) == count, loss.name  # masks are the same bits on every device
        if "diversity" not in loss.name and "contrastive" not in loss.name:
            assert float(loss.total) == pytest.approx(value, rel=0.05), loss.name
