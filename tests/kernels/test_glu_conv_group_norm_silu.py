"""The fused middle of the convolution module against stock torch in float64, sequence by sequence."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import BACKEND, INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import convolution_inputs, layout
from kernel_oracles import convolution_middle

from slam_kernels import glu_conv_group_norm_silu

RAGGED = [7, 0, 1, 4, 17, 5, 2, 0]
GRADIENTS = ("x", "conv_weight", "conv_bias", "norm_weight", "norm_bias")


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, scale: float = 0.1) -> None:
    """Within ``tolerance`` of the largest expected magnitude, or of ``scale`` if that is larger."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if expected.numel():
        error = float((actual - expected).abs().max())
        limit = tolerance * max(float(expected.abs().max()), scale)
        assert error <= limit, f"error {error:.3e}, allowed {limit:.3e}"


@contextmanager
def rows_in_a_block(rows: int):
    """Cuts sequences into blocks of ``rows`` rows, where the Triton kernels run."""
    if not INTERPRETED:
        yield
        return
    from slam_kernels.fused import glu_conv_group_norm_silu as fused

    original = fused.tile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "tile", lambda *arguments: replace(original(*arguments), rows=rows))
        yield


def compare(lengths, channels, groups, taps, backend, *, dtype=torch.float32, tolerance=1e-5, bias=True, seed=0):
    cu = layout(lengths)
    inputs = convolution_inputs(sum(lengths), channels, taps, dtype=dtype, seed=seed, bias=bias)
    out = glu_conv_group_norm_silu(*inputs, cu, num_groups=groups, eps=1e-3, backend=backend)
    expected = convolution_middle(*inputs, cu, groups, 1e-3)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    close(out, expected, tolerance)
    wanted = {n: t for n, t in zip(GRADIENTS, inputs, strict=True) if t is not None}
    generator = torch.Generator().manual_seed(seed + 1)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
    ours = dict(zip(wanted, torch.autograd.grad(out, wanted.values(), grad), strict=True))
    if not sum(lengths):
        assert all(float(g.abs().sum()) == 0 for g in ours.values())
        return
    theirs = dict(zip(wanted, torch.autograd.grad(expected, wanted.values(), grad.double()), strict=True))
    for name, tensor in wanted.items():
        assert ours[name].dtype == tensor.dtype, name
        # A convolution's parameters get sums over rows that cancel where a group is one channel: the norm undoes them.
        terms = float(theirs["x"].abs().max()) * sum(lengths) ** 0.5
        scale = terms if name.startswith("conv") else 0.1
        close(ours[name], theirs[name], tolerance, scale)


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (24, 8), (12, 4), (40, 8), (6, 1), (8, 8), (130, 13)])
def test_equals_stock_torch_on_each_sequence_alone(channels, groups, backend):
    compare([7, 0, 1, 4, 9], channels, groups, 3, backend)


def test_ragged_lengths(backend):
    compare(RAGGED, 16, 4, 5, backend)


@pytest.mark.parametrize("taps", [1, 3, 7, 31])
def test_kernel_sizes(taps, backend):
    compare([taps - 1, 1, 0, 2, 3], 8, 2, taps, backend)


def test_sequences_of_one_block_and_a_row_more_or_less(backend):
    # The kernels cut sequences into blocks of 64 rows.
    compare([63, 65, 1], 8, 2, 3, backend)


def test_without_bias(backend):
    compare(RAGGED, 16, 4, 5, backend, bias=False)


def test_float64_stays_float64(backend):
    compare(RAGGED, 16, 4, 5, backend, dtype=torch.float64, tolerance=1e-12)


def test_no_rows_at_all(backend):
    compare([0, 0], 16, 4, 5, backend)


@settings(max_examples=4 if INTERPRETED else 12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20 if INTERPRETED else 80), min_size=1, max_size=3 if INTERPRETED else 5),
    groups=st.integers(1, 6),
    size=st.integers(1, 9),
    half=st.integers(0, 3),
    block=st.sampled_from([1, 3, 8, 64]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(lengths, groups, size, half, block, seed):
    with rows_in_a_block(block):
        compare(lengths, groups * size, groups, 2 * half + 1, BACKEND, tolerance=2e-5, seed=seed)


def test_same_output_alone_and_in_any_batch(backend):
    inputs = convolution_inputs(sum(RAGGED), 16, 5, dtype=torch.float64)
    whole = glu_conv_group_norm_silu(*inputs, layout(RAGGED), num_groups=4, eps=1e-3, backend=backend)
    begin = 0
    for length in RAGGED:
        piece = inputs[0][begin : begin + length]
        alone = glu_conv_group_norm_silu(piece, *inputs[1:], layout([length]), num_groups=4, eps=1e-3, backend=backend)
        assert length == 0 or float((alone - whole[begin : begin + length]).detach().abs().max()) < 1e-12
        begin += length


def test_nan_in_a_neighbour_stays_there(backend):
    lengths = [9, 6, 11]
    inputs = convolution_inputs(sum(lengths), 16, 5)
    clean = glu_conv_group_norm_silu(*inputs, layout(lengths), num_groups=4, eps=1e-3, backend=backend)
    x = inputs[0].detach().clone()
    x[9:15] = float("nan")
    x.requires_grad_()
    out = glu_conv_group_norm_silu(x, *inputs[1:], layout(lengths), num_groups=4, eps=1e-3, backend=backend)
    keep = torch.tensor([*range(9), *range(15, 26)])
    assert torch.equal(out[keep], clean[keep])
    assert out[9:15].isnan().all()
    grads = [torch.autograd.grad(o[keep].square().sum(), i)[0][keep] for o, i in ((out, x), (clean, inputs[0]))]
    assert torch.equal(*grads)


def test_large_offset_does_not_cancel(backend):
    # A mean a thousand times the deviation: E[x^2] - E[x]^2 in float32 would lose every digit of the variance.
    inputs = list(convolution_inputs(300, 8, 3))
    inputs[2] = (inputs[2].detach() + 1000.0).requires_grad_()
    cu = layout([300])
    out = glu_conv_group_norm_silu(*inputs, cu, num_groups=2, eps=1e-3, backend=backend)
    expected = convolution_middle(*inputs, cu, 2, 1e-3)
    # The sum x + 1000 itself is rounded to 2**-15; nothing worse may be added.
    assert float((out.double() - expected).detach().abs().max()) < 5e-4


def test_same_bits_twice(backend):
    inputs = convolution_inputs(sum(RAGGED), 16, 5)

    def run():
        out = glu_conv_group_norm_silu(*inputs, layout(RAGGED), num_groups=4, eps=1e-3, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradcheck(backend):
    lengths = [3, 0, 1, 5]
    inputs = convolution_inputs(sum(lengths), 4, 3, dtype=torch.float64)

    def run(*tensors):
        return glu_conv_group_norm_silu(*tensors, layout(lengths), num_groups=2, eps=1e-3, backend=backend)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_output_is_rounded_once(dtype):
    # On the twin alone: Triton's interpreter truncates where a GPU rounds.
    inputs = convolution_inputs(sum(RAGGED), 16, 5, dtype=dtype)
    out = glu_conv_group_norm_silu(*inputs, layout(RAGGED), num_groups=4, eps=1e-3)
    expected = convolution_middle(*inputs, layout(RAGGED), 4, 1e-3)
    assert out.dtype == dtype
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert bool(((out.double() - expected).abs() <= unit * expected.abs() + 1e-5).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "must divide the 16 channels"),
        ({"cu": torch.tensor([0, 5], dtype=torch.int32)}, "rise from 0 to the number of rows 36"),
        ({"cu": torch.tensor([0, 30, 20, 36], dtype=torch.int32)}, "rise from 0"),
        ({"cu": torch.tensor([0, 36])}, "must be int32"),
        ({"weight": torch.zeros(16, 4)}, "K odd"),
        ({"weight": torch.zeros(16, 33)}, "at most"),
        ({"norm": torch.zeros(15)}, "norm_weight must have shape \\(16,\\)"),
        ({"x": torch.zeros(36, 31)}, "\\(N, 2 C\\)"),
        ({"backend": "cuda"}, "expected 'torch' or 'triton'"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    x, weight, bias, norm, beta = convolution_inputs(sum(RAGGED), 16, 5)
    with pytest.raises(ValueError, match=message):
        glu_conv_group_norm_silu(
            change.get("x", x),
            change.get("weight", weight),
            bias,
            change.get("norm", norm),
            beta,
            change.get("cu", layout(RAGGED)),
            num_groups=change.get("num_groups", 4),
            eps=1e-3,
            backend=change.get("backend", "torch"),
        )
