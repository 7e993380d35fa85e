"""The fused convolution module as a ``torch.library`` operator: launches, fake tensors, autograd.

Forward and backward keep X and the statistics (S, G) alone. Every sum over rows is a fixed tree: blocks of rows within
a program, blocks of a sequence in the finishing kernel or in one `torch.sum`; no atomics, so the same bits every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import convolution_gradient_kernels as backward_kernels
from . import convolution_kernels as forward_kernels
from .common import block_count, compute_dtype, power_of_two, search_steps


@dataclass(frozen=True)
class Tile:
    """How a pass cuts its work: rows and channels of a program, rows in flight, warps."""

    rows: int
    columns: int
    unroll: int
    warps: int


def tile(pass_name: str, channels: int, taps: int, itemsize: int) -> Tile:
    """The cut of a pass, chosen so that its registers hold the windows without spilling (checked ahead of time).

    A lane holds ``lane`` neighbouring channels: 16 bytes of X where the windows leave room for that.
    """
    lane = max(16 // itemsize, 1)
    if pass_name == "input_gradient":
        lane = min(lane, 4)
    if taps > 7:
        lane = min(lane, 2 if taps <= 15 else 1)
    warps = 1
    columns = power_of_two(channels, least=16, most=32 * lane * warps)
    return Tile(rows=64 if taps <= 7 else 128, columns=columns, unroll=taps if taps <= 7 else 4, warps=warps)


def _common(x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, pass_name: str):
    """Block count, channel blocks, and the constants every rolling pass takes."""
    channels, taps = conv_weight.shape
    cut = tile(pass_name, channels, taps, x.element_size())
    constants = {
        "C": channels,
        "TAPS": taps,
        "ROWS": cut.rows,
        "COLUMNS": cut.columns,
        "UNROLL": cut.unroll,
        "HAS_BIAS": conv_bias is not None,
        "ACC": compute_dtype(x.dtype)[1],
        "num_warps": cut.warps,
    }
    return cut, triton.cdiv(channels, cut.columns), constants


def _finish_constants(channels: int, num_groups: int, cut: Tile) -> tuple[int, dict]:
    """Group blocks, and the constants of the finishing kernels: about 256 channels of 4 blocks at a time."""
    size = power_of_two(channels // num_groups)
    groups = power_of_two(num_groups, most=max(256 // size, 1))
    constants = {"C": channels, "G": num_groups, "ROWS": cut.rows, "BLOCKS": 4, "GROUPS": groups, "SIZE": size}
    return triton.cdiv(num_groups, groups), constants


@torch.library.custom_op("slam_kernels::glu_conv_group_norm_silu", mutates_args=())
def forward_op(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor,
    num_groups: int,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (N, C) and the statistics (S, G). ``out_dtype`` is x's, or wider in tests of the arithmetic."""
    rows, sequences, channels = x.shape[0], cu_seqlens.numel() - 1, conv_weight.shape[0]
    compute, acc = compute_dtype(x.dtype)
    out = x.new_empty(rows, channels, dtype=out_dtype)
    mean = x.new_empty(sequences, num_groups, dtype=compute)
    rstd = torch.empty_like(mean)
    steps = search_steps(sequences)

    cut, columns, constants = _common(x, conv_weight, conv_bias, "statistics")
    blocks = block_count(rows, sequences, cut.rows)
    partials = x.new_empty(blocks, 2, channels, dtype=compute)
    # Triton wants a pointer also where none is read.
    bias = norm_bias if conv_bias is None else conv_bias
    forward_kernels.statistics_partials[(blocks, columns)](
        x, conv_weight, bias, cu_seqlens, partials, sequences, STEPS=steps, **constants
    )
    group_blocks, finish = _finish_constants(channels, num_groups, cut)
    forward_kernels.statistics_finish[(sequences, group_blocks)](
        partials, cu_seqlens, mean, rstd, eps, ACC=acc, **finish
    )
    cut, columns, constants = _common(x, conv_weight, conv_bias, "normalise")
    forward_kernels.normalise[(block_count(rows, sequences, cut.rows), columns)](
        x, conv_weight, bias, norm_weight, norm_bias, cu_seqlens, mean, rstd, out, sequences,
        G=num_groups, STEPS=steps, **constants,
    )  # fmt: skip
    return out, mean, rstd


@forward_op.register_fake
def _(x, conv_weight, conv_bias, norm_weight, norm_bias, cu_seqlens, num_groups, eps, out_dtype):
    statistics = (cu_seqlens.shape[0] - 1, num_groups)
    compute, _ = compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape[0], conv_weight.shape[0], dtype=out_dtype),
        x.new_empty(statistics, dtype=compute),
        x.new_empty(statistics, dtype=compute),
    )


@torch.library.custom_op("slam_kernels::glu_conv_group_norm_silu_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (N, 2 C), conv_weight (C, K), conv_bias, norm_weight and norm_bias (C,), the last four in ACC."""
    rows, sequences = x.shape[0], cu_seqlens.numel() - 1
    channels, taps = conv_weight.shape
    compute, acc = compute_dtype(x.dtype)
    steps = search_steps(sequences)
    bias = norm_bias if conv_bias is None else conv_bias
    operands = (x, conv_weight, bias, norm_weight, norm_bias, cu_seqlens, mean, rstd, grad)

    cut, columns, constants = _common(x, conv_weight, conv_bias, "norm_gradient")
    blocks = block_count(rows, sequences, cut.rows)
    partials = x.new_empty(blocks, 2, channels, dtype=compute)
    backward_kernels.norm_gradient_partials[(blocks, columns)](
        *operands, partials, sequences, G=num_groups, STEPS=steps, **constants
    )
    dmean, dnorm = torch.empty_like(mean), torch.empty_like(mean)
    group_blocks, finish = _finish_constants(channels, num_groups, cut)
    backward_kernels.norm_gradient_finish[(sequences, group_blocks)](
        partials, norm_weight, cu_seqlens, dmean, dnorm, ACC=acc, **finish
    )
    norm_gradients = partials.sum(0)

    cut, columns, constants = _common(x, conv_weight, conv_bias, "input_gradient")
    blocks = block_count(rows, sequences, cut.rows)
    partials = x.new_empty(blocks, taps + 1, channels, dtype=compute)
    dx = torch.empty_like(x, dtype=grad_dtype)
    backward_kernels.input_gradient[(blocks, columns)](
        *operands, dmean, dnorm, dx, partials, sequences, G=num_groups, STEPS=steps, **constants
    )
    conv_gradients = partials.sum(0)
    return (
        dx,
        conv_gradients[:taps].t().contiguous(),
        conv_gradients[taps].clone(),
        norm_gradients[1].clone(),
        norm_gradients[0].clone(),
    )


@backward_op.register_fake
def _(grad, x, conv_weight, conv_bias, norm_weight, norm_bias, cu_seqlens, mean, rstd, num_groups, grad_dtype):
    compute, _ = compute_dtype(x.dtype)
    wide = [x.new_empty(shape, dtype=compute) for shape in (conv_weight.shape, *[norm_weight.shape] * 3)]
    return torch.empty_like(x, dtype=grad_dtype), *wide


def _setup(ctx, inputs, output):
    x, conv_weight, conv_bias, norm_weight, norm_bias, cu_seqlens, num_groups, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, conv_weight, conv_bias, norm_weight, norm_bias, cu_seqlens, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.num_groups = num_groups


def _backward(ctx, grad, _mean, _rstd):
    x, conv_weight, conv_bias, norm_weight, norm_bias, *_ = ctx.saved_tensors
    gradients = backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.num_groups, x.dtype)
    cast = [
        None if parameter is None else gradient.to(parameter.dtype)
        for gradient, parameter in zip(gradients, (x, conv_weight, conv_bias, norm_weight, norm_bias), strict=True)
    ]
    return *cast, None, None, None, None


forward_op.register_autograd(_backward, setup_context=_setup)


def glu_conv_group_norm_silu(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor,
    *,
    num_groups: int,
    eps: float,
) -> Tensor:
    """See `slam_kernels.glu_conv_group_norm_silu`."""
    parameters = [None if p is None else p.contiguous() for p in (conv_weight, conv_bias, norm_weight, norm_bias)]
    return forward_op(x.contiguous(), *parameters, cu_seqlens.contiguous(), num_groups, eps, x.dtype)[0]
