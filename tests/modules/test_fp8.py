"""FP8 layers without a GPU: names and checkpoints know nothing of them, and nothing of them runs where it is not asked
for. Transformer Engine is a stand-in that computes in float32."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import te_stand_in
import torch
from torch import nn

from nemo_slam.modules import fp8
from nemo_slam.modules.conformer import ConformerConfig, ConformerStack
from nemo_slam.packing import SequenceLayout
from nemo_slam.training.precision import ScalingState, borrowers

SMALL = {"d_model": 32, "d_ff": 64, "n_heads": 2, "conv_norm_groups": 4, "dropout": 0.0}
LAYERS = 2
PRODUCTS = 8  # of a layer: feed-forward 2 x 2, queries with keys and values, attention's output, pointwise 2


def stack(**changes) -> ConformerStack:
    torch.manual_seed(0)
    return ConformerStack(ConformerConfig(**{**SMALL, **changes}), LAYERS)


def wide(**changes) -> ConformerStack:
    """One head of 128, as FP8 attention wants it."""
    torch.manual_seed(0)
    return ConformerStack(ConformerConfig(**{**SMALL, "d_model": 128, "n_heads": 1, **changes}), LAYERS)


@pytest.fixture
def layout():
    return SequenceLayout.build(np.array([5, 70, 0, 21]), multiple=16)


def run(module, layout, width=32):
    torch.manual_seed(1)
    rows = torch.randn(layout.num_rows, width, requires_grad=True)
    out = module(rows, layout)
    valid = out[: layout.num_valid]
    # A layer ends in a LayerNorm, whose output has nearly the same sum of squares whatever comes in.
    (valid * torch.randn(valid.shape)).sum().backward()
    return valid.detach(), rows.grad[: layout.num_valid]


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("mode", ["gemm", "attention"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_borrowed_weights_give_the_outputs_and_gradients_of_plain_layers(
    transformer_engine, layout, mode, checkpointing
):
    plain, ours = wide(), wide(fp8=mode, activation_checkpointing=checkpointing)
    expected, results = run(plain, layout, 128), run(ours, layout, 128)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    wanted = gradients(plain)
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    linear = [inside for kind, inside in transformer_engine.calls if kind == "linear"]
    attention = [shape for kind, shape in transformer_engine.calls if kind == "attention"]
    runs = 2 if checkpointing else 1
    assert len(linear) == runs * LAYERS * PRODUCTS
    assert all(linear)  # each inside the FP8 region
    # Two classes of lengths: 70 alone, and 5 with 21.
    assert attention == ([(1, 128, 1, 128), (2, 64, 1, 128)] * runs * LAYERS if mode == "attention" else [])
    assert transformer_engine.checkpoints == (LAYERS if checkpointing else 0)


def test_the_recipe(transformer_engine):
    for mode in ("gemm", "attention"):
        recipe = fp8.recipe(mode)
        assert isinstance(recipe, te_stand_in.DelayedScaling)
        assert recipe.fp8_dpa == (mode == "attention")
        assert not recipe.fp8_mha
        assert not recipe.reduce_amax  # ranks have other blocks: a reduction over them would hang
        assert recipe.fp8_format == te_stand_in.Format.HYBRID


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformer_engine_is_not_touched_without_fp8(monkeypatch, layout, checkpointing):
    """A machine whose Transformer Engine fails at every touch trains without FP8."""

    class Broken:
        def __getattr__(self, name):
            raise AssertionError(f"transformer_engine.{name} was touched")

    monkeypatch.setitem(sys.modules, "transformer_engine", Broken())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", Broken())
    monkeypatch.setattr(fp8, "load", lambda: pytest.fail("Transformer Engine was imported"))
    run(stack(activation_checkpointing=checkpointing), layout)


def test_autocast_is_not_entered_without_fp8(transformer_engine, layout):
    run(stack(), layout)
    run(stack(activation_checkpointing=True), layout)
    assert transformer_engine.entered == 0
    run(stack(fp8="gemm"), layout)
    assert transformer_engine.entered == 1


@pytest.mark.parametrize("mode", ["gemm", "attention"])
def test_scales_first_made_in_inference_mode_can_be_trained(transformer_engine, layout, monkeypatch, mode):
    """Lightning validates in inference mode, whose tensors nobody may write to afterwards; TE makes scales on first
    use, and its checkpointing writes to them."""
    scales = []

    def prepare(module):
        scales.append(torch.ones(1))
        assert not torch.is_grad_enabled()

    ours, plain = wide(fp8=mode).eval(), wide().eval()
    rows = torch.randn(layout.num_rows, 128)
    expected = plain(rows, layout)
    with monkeypatch.context() as patched, torch.inference_mode():
        patched.setattr(te_stand_in.BaseModule, "prepare", prepare)
        out = ours(rows, layout)
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(out[: layout.num_valid], expected[: layout.num_valid].detach(), rtol=1e-4, atol=1e-4)
    assert scales
    for scale in scales:
        scale.fill_(2.0)
    run(ours.train(), layout, 128)


def test_fp8_on_a_cpu_is_an_error_before_anything_ran(layout):
    with pytest.raises(fp8.BackendError, match=r"fp8=gemm on cpu: .*needs an NVIDIA GPU.*fp8=none"):
        run(stack(fp8="gemm"), layout)


def test_rows_that_fp8_cannot_take(transformer_engine):
    layout = SequenceLayout.build(np.array([5]), multiple=3)
    with pytest.raises(ValueError, match=r"multiples of 16, got 6: set pad_multiple"):
        run(stack(fp8="gemm"), layout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp8": "attention"}, "heads of size 128 .* not 16"),
        ({"fp8": "gemm", "d_model": 40}, "multiples of 16, not 40 and 64"),
        ({"attention": "flash"}, "attention: 'flash'"),
    ],
)
def test_config_that_no_machine_has(changes, message):
    with pytest.raises(ValueError, match=message):
        ConformerConfig(**{**SMALL, **changes})


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["none", "gemm", "attention"])
@pytest.mark.parametrize("loaded", ["none", "gemm", "attention"])
def test_weights_go_both_ways(transformer_engine, layout, trained, loaded):
    source = wide(fp8=trained)
    run(source, layout, 128)  # FP8 ran: Transformer Engine's modules have a state now
    weights = source.state_dict()
    assert not [name for name in weights if "extra_state" in name or "products" in name or "transformer" in name]
    assert list(weights) == list(wide().state_dict())
    target = wide(fp8=loaded)
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    target.load_state_dict(weights)  # strict
    torch.testing.assert_close(run(target, layout, 128)[0], run(source, layout, 128)[0], rtol=1e-4, atol=1e-4)


def test_extra_state_of_transformer_engines_own_modules_is_dropped(transformer_engine, layout):
    """Weights saved by a model whose layers are modules of Transformer Engine, FP8 state and all."""
    theirs = stack()
    for layer in theirs:
        linear = layer.feed_forward1.linear1
        layer.feed_forward1.linear1 = te_stand_in.Linear(linear.in_features, linear.out_features, device="cpu")
        with te_stand_in.autocast(recipe=fp8.recipe("gemm")):
            layer.feed_forward1.linear1(torch.randn(16, linear.in_features))
    weights = theirs.state_dict()
    extra = [name for name in weights if name.endswith("_extra_state")]
    assert len(extra) == LAYERS
    assert all(weights[name].numel() for name in extra)
    ours = stack()
    ours.load_state_dict(weights)
    torch.testing.assert_close(run(ours, layout)[0], run(theirs, layout)[0])


def test_a_copy_has_weights_and_scales_of_its_own(transformer_engine, layout):
    source = wide(fp8="attention")
    run(source, layout, 128)
    other = copy.deepcopy(source)
    torch.testing.assert_close(run(other, layout, 128)[0], run(source, layout, 128)[0])
    for (name, ours), theirs in zip(borrowers(source).items(), borrowers(other).values(), strict=True):
        for key in ours:
            assert ours[key].module() is not theirs[key].module(), (name, key)


class Trainer:
    global_rank = 0


def test_scales_are_kept_over_a_resume(transformer_engine, layout):
    source, target = wide(fp8="attention"), wide(fp8="attention")
    for _ in range(3):
        run(source, layout, 128)
    checkpoint: dict = {}
    ScalingState().on_save_checkpoint(Trainer(), source, checkpoint)
    saved = checkpoint[ScalingState.KEY][0]
    assert len(saved) == LAYERS * (PRODUCTS + 2)  # and two widths of attention
    ScalingState().on_load_checkpoint(Trainer(), target, checkpoint)
    run(target, layout, 128)
    steps = [b.module().fp8_meta["steps"] for group in borrowers(target).values() for b in group.values()]
    assert steps == [4] * len(saved)
    again: dict = {}
    ScalingState().on_save_checkpoint(Trainer(), wide(fp8="attention"), again)
    assert again == {}  # nothing ran, nothing to keep


def test_a_run_without_fp8_keeps_no_scales_and_ignores_others(transformer_engine, layout):
    source, plain = wide(fp8="gemm"), wide()
    run(source, layout, 128)
    run(plain, layout, 128)
    checkpoint: dict = {}
    ScalingState().on_save_checkpoint(Trainer(), plain, checkpoint)
    assert checkpoint == {}
    ScalingState().on_save_checkpoint(Trainer(), source, checkpoint)
    ScalingState().on_load_checkpoint(Trainer(), plain, checkpoint)
    run(plain, layout, 128)
    assert all(borrower._module is None for group in borrowers(plain).values() for borrower in group.values())
