"""FP8 on a GPU that has it: that it is FP8, forward and backward; how far it is from float32; that checkpoints know
nothing of it. Skipped with the reason elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "modules"))
import te_stand_in
from attention_oracle import attention

from nemo_slam.modules import fp8
from nemo_slam.modules.attention_backends import AttentionSettings, resolve_backend
from nemo_slam.modules.attention_te import TransformerEngineAttention
from nemo_slam.modules.conformer import ConformerConfig, ConformerStack
from nemo_slam.packing import SequenceLayout
from nemo_slam.training.precision import ScalingState, check_run
from slam_kernels import BackendError

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
_REASON = fp8.unavailable("attention", DEVICE)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"no FP8 attention: {_REASON}")]

LENGTHS = [700, 0, 1, 64, 65, 333, 17, 129]
HEADS, SIZE, WIDTH = 2, 128, 256


def relative(a, b) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def stack(mode: str, **changes) -> ConformerStack:
    torch.manual_seed(0)
    small = {"d_model": WIDTH, "d_ff": 1024, "n_heads": HEADS, "conv_norm_groups": 8, "dropout": 0.0}
    return ConformerStack(ConformerConfig(**{**small, "fp8": mode, **changes}), 2).cuda()


def step(module, lengths=tuple(LENGTHS), dtype=torch.bfloat16):
    layout = SequenceLayout.build(np.array(lengths), "cuda", multiple=128)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(layout.num_rows, WIDTH, generator=generator).cuda().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = module(rows, layout)
    assert torch.isfinite(out).all()
    valid = out[: layout.num_valid].float()
    # A layer ends in a LayerNorm, whose output has nearly the same sum of squares whatever comes in.
    (valid * torch.randn(valid.shape, generator=generator).cuda()).mean().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return valid.detach(), rows.grad[: layout.num_valid], grads


def settled(module, steps=8):
    """The last of a few steps. With the first scale, 1, gradients as small as here are 0 in FP8, and nothing comes to
    the product before: so the scales are found one product after the other, and a layer has five in a row."""
    return [step(module) for _ in range(steps)][-1]


def test_the_stand_in_of_the_cpu_tests_has_the_interface_of_what_is_installed():
    engine = fp8.load()
    recipes = sys.modules["transformer_engine.common.recipe"]
    pairs = [
        (te_stand_in.Linear.__init__, engine.Linear.__init__),
        (te_stand_in.Linear.forward, engine.Linear.forward),
        (te_stand_in.DotProductAttention.__init__, engine.DotProductAttention.__init__),
        (te_stand_in.DotProductAttention.forward, engine.DotProductAttention.forward),
        (te_stand_in.autocast, engine.autocast),
        (te_stand_in.is_fp8_available, engine.is_fp8_available),
    ]
    for ours, theirs in pairs:
        missing = set(inspect.signature(ours).parameters) - set(inspect.signature(theirs).parameters)
        assert not missing, (theirs, missing)
    fp8.recipe("attention")
    fields = {field.name for field in dataclasses.fields(te_stand_in.DelayedScaling)}
    assert fields <= {field.name for field in dataclasses.fields(recipes.DelayedScaling)}


def attend(mode: str, steps: int = 3):
    """Last of a few calls on ragged rows: output and gradient, beside the exact ones."""
    layout = SequenceLayout.build(np.array(LENGTHS), "cuda", multiple=128)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(layout.num_rows, 3, HEADS, SIZE, generator=generator).bfloat16()
    weight = torch.randn(layout.num_valid, HEADS, SIZE, generator=generator)
    module = TransformerEngineAttention(HEADS, SIZE, 0.0)
    leaf = qkv.cuda().requires_grad_()
    for _ in range(steps):
        leaf.grad = None
        with fp8.region(mode, DEVICE):
            out = module.attend(leaf, layout, training=True)
        (out[: layout.num_valid].float() * weight.cuda()).sum().backward()
    wide = qkv.double().requires_grad_()
    exact = attention(wide, LENGTHS)
    (exact * weight.double()).sum().backward()
    rows = slice(layout.num_valid)
    return (out[rows].cpu(), leaf.grad[rows].cpu()), (exact.detach(), wide.grad[rows]), out[layout.num_valid :]


def test_fp8_attention_is_fp8_forward_and_backward(monkeypatch):
    backends = sys.modules.get("transformer_engine.pytorch.attention.dot_product_attention.backends")
    if backends is None:
        fp8.load()
        backends = sys.modules["transformer_engine.pytorch.attention.dot_product_attention.backends"]
    calls: dict[str, list] = {"fused_attn_fwd": [], "fused_attn_bwd": []}

    def spy(name):
        original = getattr(backends, name)

        def wrapper(*arguments, **options):
            bound = inspect.signature(original).bind(*arguments, **options).arguments
            calls[name].append((type(bound["q"]).__name__, bound["fused_attention_backend"]))
            return original(*arguments, **options)

        monkeypatch.setattr(backends, name, wrapper)

    for name in calls:
        spy(name)
    (out, grad), (exact, exact_grad), tail = attend("attention")
    assert "FP8" in fp8.backend_in_use()
    for name, seen in calls.items():
        assert seen, name
        assert all("Float8" in kind for kind, _ in seen), (name, seen)
        assert {backend for _, backend in seen} == {backends.FusedAttnBackend["FP8"]}, name
    assert relative(out, exact) < 0.15
    assert relative(grad, exact_grad) < 0.3
    assert torch.isfinite(out).all()
    assert torch.isfinite(grad).all()
    assert (tail == 0).all()


def test_transformer_engines_attention_in_bfloat16():
    (out, grad), (exact, exact_grad), tail = attend("none", steps=1)
    assert relative(out, exact) < 0.02
    assert relative(grad, exact_grad) < 0.03
    assert (tail == 0).all()


@pytest.mark.parametrize("mode", ["gemm", "attention"])
def test_layers_in_fp8_are_near_float32(mode):
    exact_out, exact_rows, exact = step(stack("none", attention="sdpa"), dtype=torch.float32)
    out, rows, grads = settled(stack(mode))
    assert relative(out, exact_out) < 0.1
    assert relative(rows, exact_rows) < 0.3
    for name, grad in grads.items():
        assert grad.dtype == torch.float32, name
        assert torch.isfinite(grad).all(), name
        # Without the key's bias, whose gradient is zero; one that is missing would be 1 away.
        assert "linear_k.bias" in name or relative(grad, exact[name]) < 0.6, name
    flat = [torch.cat([g.flatten() for n, g in group.items() if "linear_k.bias" not in n]) for group in (grads, exact)]
    assert relative(*flat) < 0.3
    plain = settled(stack("none"), steps=1)
    assert relative(out, plain[0]) > 1e-3  # it is not bfloat16 under another name


def test_products_run_in_fp8(monkeypatch):
    module = sys.modules.get("transformer_engine.pytorch.module.linear")
    if module is None:
        fp8.load()
        module = sys.modules["transformer_engine.pytorch.module.linear"]
    seen = []
    original = module.general_gemm

    def spy(*arguments, **options):
        seen.append(tuple(type(x).__name__ for x in arguments[:2]))
        return original(*arguments, **options)

    monkeypatch.setattr(module, "general_gemm", spy)
    step(stack("gemm"))
    products = 2 * 8  # layers, and products of each
    assert len(seen) == 3 * products  # forward, and two for the gradients
    assert all("Float8" in name for pair in seen for name in pair), set(seen)


def test_checkpointed_layers_replay_their_scales():
    plain, ours = settled(stack("attention")), settled(stack("attention", activation_checkpointing=True))
    assert relative(ours[0], plain[0]) < 0.02
    assert relative(ours[1], plain[1]) < 0.05


def test_compiled_layers_with_fp8():
    plain, ours = settled(stack("gemm")), settled(stack("gemm", compile=True))
    assert relative(ours[0], plain[0]) < 0.05


def test_weights_go_both_ways():
    trained = stack("attention")
    settled(trained)
    weights = trained.state_dict()
    assert list(weights) == list(stack("none").state_dict())
    plain = stack("none", attention="sdpa")
    plain.load_state_dict(weights)
    again = stack("attention")
    again.load_state_dict(plain.state_dict())
    assert relative(settled(again)[0], step(plain)[0]) < 0.1


class Trainer:
    global_rank = 0


def test_scales_are_kept_over_a_resume():
    source, target = stack("attention"), stack("attention")
    settled(source)
    checkpoint: dict = {}
    ScalingState().on_save_checkpoint(Trainer(), source, checkpoint)
    ScalingState().on_load_checkpoint(Trainer(), target, checkpoint)
    target.load_state_dict(source.state_dict())
    expected, result = step(source), step(target)
    assert relative(result[0], expected[0]) < 1e-3
    assert relative(result[1], expected[1]) < 1e-2


def test_start_up_says_that_it_is_fp8():
    module = stack("attention")
    config = ConformerConfig(d_model=WIDTH, d_ff=1024, n_heads=HEADS, conv_norm_groups=8, fp8="attention")
    rows = dict(check_run(module, config, 128, "auto", "bf16-mixed", DEVICE))
    assert "FP8: attention" in rows["precision"]
    assert rows["attention"].startswith("te: FusedAttention")
    assert "FP8" in rows["attention"]
    with pytest.raises(ValueError, match="bf16-mixed"):
        check_run(module, config, 128, "auto", "32-true", DEVICE)
    with pytest.raises(ValueError, match="pad_multiple"):
        check_run(module, config, 24, "auto", "bf16-mixed", DEVICE)


def test_deterministic_mode_is_refused():
    resolve_backend.cache_clear()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(BackendError, match="no deterministic backward"):
            resolve_backend(AttentionSettings("auto", "attention", HEADS, SIZE), DEVICE, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
        resolve_backend.cache_clear()
