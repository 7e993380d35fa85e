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
    """The cut of a pass, such that its windows stay in registers (checked ahead of time, not yet tuned on a GPU).

    A lane holds ``lane`` neighbouring channels: 16 bytes of X where the windows leave room for that.
    """
    lane = max(16 // itemsize, 1)
    if pass_name == "input_gradient":
        lane = min(lane, 4)
    if taps > 7:
        lane = min(lane, 2 if taps <= 15 else 1)
    columns = power_of_two(channels, least=16, most=32 * lane)
    return Tile(rows=64 if taps <= 7 else 128, columns=columns, unroll=taps if taps <= 7 else 4, warps=1)


@dataclass(frozen=True)
class Launch:
    """One pass over all channels or a slice of them: its blocks of rows, channels and groups, and its constants."""

    blocks: int
    column_blocks: int
    rolling: dict
    sequences: int
    group_blocks: int
    finishing: dict


def plan(pass_name: str, x: Tensor, taps: int, has_bias: bool, cu_seqlens: Tensor, groups: int, slices: int) -> Launch:
    """The launches of a pass and of the kernel that finishes its sums."""
    channels, sequences = x.shape[1] // 2, cu_seqlens.numel() - 1
    cut = tile(pass_name, channels, taps, x.element_size())
    size = power_of_two(channels // groups)
    width, some = channels // slices, groups // slices
    together = power_of_two(some, most=max(256 // size, 1))
    if slices > 1 and (channels % slices or width % cut.columns or groups % slices or some % together):
        raise ValueError(f"{channels} channels in {groups} groups cannot be cut into {slices} slices of whole blocks")
    acc = compute_dtype(x.dtype)[1]
    return Launch(
        blocks=block_count(x.shape[0], sequences, cut.rows),
        column_blocks=triton.cdiv(width, cut.columns),
        rolling={
            "C": channels, "TAPS": taps, "ROWS": cut.rows, "COLUMNS": cut.columns, "UNROLL": cut.unroll,
            "STEPS": search_steps(sequences), "HAS_BIAS": has_bias, "ACC": acc, "num_warps": cut.warps,
        },
        sequences=sequences,
        group_blocks=triton.cdiv(some, together),
        # About 256 channels of 4 blocks at a time.
        finishing={
            "C": channels, "G": groups, "ROWS": cut.rows, "BLOCKS": 4, "GROUPS": together, "SIZE": size, "ACC": acc,
        },
    )  # fmt: skip


def run_forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor,
    num_groups: int,
    eps: float,
    out_dtype: torch.dtype,
    slices: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (N, C) and the statistics (S, G).

    With ``slices`` above 1 the passes alternate over that many slices of the channels, so that the second finds what
    the first read in the L2 cache if a slice fits; the benchmark tries it.
    """
    (channels, taps), sequences = conv_weight.shape, cu_seqlens.numel() - 1
    compute, _ = compute_dtype(x.dtype)
    shared = (taps, conv_bias is not None, cu_seqlens, num_groups, slices)
    first, second = plan("statistics", x, *shared), plan("normalise", x, *shared)
    # Triton wants a pointer also where none is read.
    bias = norm_bias if conv_bias is None else conv_bias
    out = x.new_empty(x.shape[0], channels, dtype=out_dtype)
    mean = x.new_empty(sequences, num_groups, dtype=compute)
    rstd = torch.empty_like(mean)
    partials = x.new_empty(first.blocks, 2, channels, dtype=compute)
    for part in range(slices):
        forward_kernels.statistics_partials[(first.blocks, first.column_blocks)](
            x, conv_weight, bias, cu_seqlens, partials, sequences, part * first.column_blocks, **first.rolling
        )
        forward_kernels.statistics_finish[(sequences, first.group_blocks)](
            partials, cu_seqlens, mean, rstd, part * first.group_blocks, eps, **first.finishing
        )
        forward_kernels.normalise[(second.blocks, second.column_blocks)](
            x, conv_weight, bias, norm_weight, norm_bias, cu_seqlens, mean, rstd, out, sequences,
            part * second.column_blocks, G=num_groups, **second.rolling,
        )  # fmt: skip
    return out, mean, rstd


def run_backward(
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
    slices: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (N, 2 C), conv_weight (C, K), conv_bias, norm_weight and norm_bias (C,), the last four in ACC."""
    (channels, taps), sequences = conv_weight.shape, cu_seqlens.numel() - 1
    compute, _ = compute_dtype(x.dtype)
    shared = (taps, conv_bias is not None, cu_seqlens, num_groups, slices)
    first, second = plan("norm_gradient", x, *shared), plan("input_gradient", x, *shared)
    bias = norm_bias if conv_bias is None else conv_bias
    operands = (x, conv_weight, bias, norm_weight, norm_bias, cu_seqlens, mean, rstd, grad)
    norm_partials = x.new_empty(first.blocks, 2, channels, dtype=compute)
    conv_partials = x.new_empty(second.blocks, taps + 1, channels, dtype=compute)
    dmean, dnorm = torch.empty_like(mean), torch.empty_like(mean)
    dx = torch.empty_like(x, dtype=grad_dtype)
    for part in range(slices):
        backward_kernels.norm_gradient_partials[(first.blocks, first.column_blocks)](
            *operands, norm_partials, sequences, part * first.column_blocks, G=num_groups, **first.rolling
        )
        backward_kernels.norm_gradient_finish[(sequences, first.group_blocks)](
            norm_partials, norm_weight, cu_seqlens, dmean, dnorm, part * first.group_blocks, **first.finishing
        )
        backward_kernels.input_gradient[(second.blocks, second.column_blocks)](
            *operands,
            dmean,
            dnorm,
            dx,
            conv_partials,
            sequences,
            part * second.column_blocks,
            G=num_groups,
            **second.rolling,
        )
    norm_gradients, conv_gradients = norm_partials.sum(0), conv_partials.sum(0)
    return (
        dx,
        conv_gradients[:taps].t().contiguous(),
        conv_gradients[taps].clone(),
        norm_gradients[1].clone(),
        norm_gradients[0].clone(),
    )


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
    """`run_forward`. ``out_dtype`` is x's, or wider in tests of the arithmetic."""
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return run_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, cu_seqlens, num_groups, eps, out_dtype)


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
    """`run_backward`. ``grad_dtype`` is x's, or wider in tests of the arithmetic."""
    with torch.cuda.device_of(x):
        return run_backward(
            grad, x, conv_weight, conv_bias, norm_weight, norm_bias, cu_seqlens, mean, rstd, num_groups, grad_dtype
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
    saved = ctx.saved_tensors  # once: under activation checkpointing a second look finds them gone
    x, conv_weight, conv_bias, norm_weight, norm_bias, *_ = saved
    gradients = backward_op(grad.contiguous(), *saved, ctx.num_groups, x.dtype)
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
