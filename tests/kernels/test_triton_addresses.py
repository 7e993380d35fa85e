"""Rows beyond 2**31 elements: the last programs of a batch that is never touched elsewhere.

The memory is reserved, not filled: only pages that a program reads or writes exist.
"""

from __future__ import annotations

import pytest
import torch
from kernel_batches import KEY, convolution_inputs, layout

from slam_kernels import apply_spans, glu_conv_group_norm_silu

CHANNELS, TAIL = 4096, 9
ROWS = (1 << 31) // CHANNELS + 1000 + TAIL


@pytest.fixture(autouse=True)
def _unfilled(monkeypatch, _poisoned_memory):
    """Poison would touch every page."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.fixture
def last_programs(monkeypatch):
    """Shifts the first grid index of every launch to the end of the grid that the rows would have."""
    from triton.runtime.interpreter import interpreter_builder

    original = interpreter_builder.set_grid_idx
    shift = {"by": 0}

    def shifted(x, y, z):
        interpreter_builder.grid_dim = (x + shift["by"] + 1, *interpreter_builder.grid_dim[1:])
        original(x + shift["by"], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", shifted)
    return shift


def test_convolution_reaches_the_last_rows(last_programs):
    import triton.language as tl

    from slam_kernels.fused import convolution_gradient_kernels as backward_kernels
    from slam_kernels.fused import convolution_kernels as forward_kernels

    x, weight, bias, gamma, beta = (t.detach() for t in convolution_inputs(TAIL, CHANNELS, 3))
    small, first = layout([TAIL]), ROWS - TAIL
    big = torch.tensor([0, first, ROWS], dtype=torch.int32)
    rows = 16
    constants = {
        "C": CHANNELS, "TAPS": 3, "ROWS": rows, "COLUMNS": CHANNELS, "UNROLL": 3, "HAS_BIAS": True,
        "ACC": tl.float32, "STEPS": 1,
    }  # fmt: skip
    reserved = torch.empty(ROWS, 2 * CHANNELS)
    reserved[first:] = x
    x.requires_grad_()
    out = glu_conv_group_norm_silu(x, weight, bias, gamma, beta, small, num_groups=4, eps=1e-3, backend="torch")
    grad = torch.randn(TAIL, CHANNELS, generator=torch.Generator().manual_seed(1))
    (dx,) = torch.autograd.grad(out, x, grad)

    from slam_kernels.fused.glu_conv_group_norm_silu import forward_op

    _, mean, rstd = forward_op(x.detach(), weight, bias, gamma, beta, small, 4, 1e-3, torch.float32)
    statistics = [torch.cat((torch.full_like(t, float("nan")), t)) for t in (mean, rstd)]
    last_programs["by"] = first // rows + 1  # the block where the second sequence begins
    z = torch.empty(ROWS, CHANNELS)
    forward_kernels.normalise[(1, 1)](reserved, weight, bias, gamma, beta, big, *statistics, z, 2, 0, G=4, **constants)
    torch.testing.assert_close(z[first:], out.detach(), rtol=1e-5, atol=1e-5)

    gradient = torch.empty(ROWS, CHANNELS)
    gradient[first:] = grad
    blocks = first // rows + 2
    partials = torch.empty(blocks, 2, CHANNELS)
    operands = (reserved, weight, bias, gamma, beta, big, *statistics, gradient)
    backward_kernels.norm_gradient_partials[(1, 1)](*operands, partials, 2, 0, G=4, **constants)
    sums = partials[-1].view(2, 4, -1).mul(gamma.view(4, -1)).sum(-1) / (TAIL * CHANNELS // 4)
    means = [torch.stack((torch.full_like(s, float("nan")), s)) for s in sums]
    slopes = torch.empty(ROWS, 2 * CHANNELS)
    backward_kernels.input_gradient[(1, 1)](
        *operands, *means, slopes, torch.empty(blocks, 4, CHANNELS), 2, 0, G=4, **constants
    )
    torch.testing.assert_close(slopes[first:], dx, rtol=1e-4, atol=1e-5)


def test_masking_reaches_the_last_rows(last_programs):
    from slam_kernels.fused.apply_spans import replace_rows, replace_rows_backward

    first = ROWS - TAIL
    mask = torch.zeros(ROWS, dtype=torch.bool)
    mask[-TAIL::2] = True
    cu = torch.tensor([0, first, ROWS], dtype=torch.int32)
    ids, epochs = torch.tensor([1, 2]), torch.tensor([0, 0])
    x, y = torch.empty(ROWS, CHANNELS), torch.empty(ROWS, CHANNELS)
    x[first:] = torch.randn(TAIL, CHANNELS)
    through = mask.cumsum(0)
    index = torch.empty(TAIL, dtype=torch.int64)
    last_programs["by"] = first
    replace_rows[(TAIL, 1)](
        x, mask.view(torch.int8), through, cu, ids, epochs, x, y, index, 2, KEY, 0.1,
        D=CHANNELS, STEPS=1, QUADS=CHANNELS // 4, LEARNED=False,
    )  # fmt: skip
    alone, _ = apply_spans(
        x[first:], mask[first:], layout([TAIL]), ids[1:], epochs[1:], key=KEY, vector=None, std=0.1, backend="torch"
    )
    assert torch.equal(y[first:], alone)
    assert index[: (TAIL + 1) // 2].tolist() == list(range(first, ROWS, 2))

    dx = torch.empty(ROWS, CHANNELS)
    last_programs["by"] = first // 32
    partials = torch.empty(1, 1)
    import triton.language as tl

    replace_rows_backward[(2, 1)](
        x, mask.view(torch.int8), dx, partials, ROWS, D=CHANNELS, ROWS=32, COLUMNS=CHANNELS, LEARNED=False,
        ACC=tl.float32,
    )  # fmt: skip
    assert torch.equal(dx[first:], x[first:] * ~mask[first:, None])
