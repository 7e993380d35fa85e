"""PyTorch twin of the convolution module's middle: GLU, depthwise convolution, GroupNorm, SiLU for each sequence.

Gradients are written by hand: autograd's make a third more passes over the rows, which is what a CPU's time goes to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .packed import row_sequences, segment_sum


class _PackedDepthwiseConv(torch.autograd.Function):
    """Depthwise "same" convolution of packed rows, K multiply-adds over shifted views.

    Every sequence is preceded by K // 2 rows of zeros, and the last one followed by as many: so one shift serves all
    sequences and none sees its neighbour. In-place accumulation halves the temporaries that autograd would keep.
    """

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, sequences: torch.Tensor):
        taps = weight.t().contiguous()  # a row a tap: a strided broadcast costs several times as much
        half = weight.shape[1] // 2
        place = torch.arange(rows.shape[0], device=rows.device) + (sequences + 1) * half
        spaced = rows.new_zeros(rows.shape[0] + cu_seqlens.numel() * half, rows.shape[1]).index_copy_(0, place, rows)
        ctx.save_for_backward(spaced, place, taps)
        span = spaced.shape[0] - 2 * half
        out = spaced[half : half + span] * taps[half]
        for tap in range(weight.shape[1]):
            if tap != half:
                out.addcmul_(spaced[tap : tap + span], taps[tap])
        return out.index_select(0, place - half)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        spaced, place, taps = ctx.saved_tensors
        half = taps.shape[0] // 2
        span = spaced.shape[0] - 2 * half
        grad_spaced = torch.zeros_like(spaced).index_copy_(0, place, grad)
        product = torch.empty_like(spaced)[:span]  # used again and again: fresh memory costs as much as the product
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[1]:
            inner = grad_spaced[half : half + span]
            sums = [torch.mul(spaced[tap : tap + span], inner, out=product).sum(0) for tap in range(taps.shape[0])]
            grad_weight = torch.stack(sums, dim=1)
        if ctx.needs_input_grad[0]:
            total = torch.mul(grad_spaced[half : half + span], taps[half], out=product)
            for tap in range(taps.shape[0]):
                if tap != half:
                    total.addcmul_(grad_spaced[2 * half - tap : 2 * half - tap + span], taps[tap])
            grad_rows = total.index_select(0, place - half)
        return grad_rows, grad_weight, None, None


class _PackedGroupNormSiLU(torch.autograd.Function):
    """GroupNorm over each sequence's own rows, affine and SiLU. *Shape:* (N, C) -> (N, C)."""

    @staticmethod
    def forward(ctx, rows, weight, bias, cu_seqlens, sequences, num_groups: int, eps: float):
        count, channels = rows.shape
        grouped = rows.view(count, num_groups, channels // num_groups)
        layout = cu_seqlens, sequences
        # Two passes, mean first: the squares of deviations are summed, never a difference of large sums.
        normal = grouped - _spread(_group_means(grouped, *layout), grouped, sequences)
        variance = _group_means(normal.square(), *layout)
        scale = _spread((variance + eps).rsqrt(), grouped, sequences)
        normal = normal.mul_(scale).view(count, channels)
        affine = torch.addcmul(bias, normal, weight)
        ctx.save_for_backward(normal, affine, weight, scale, *layout)
        return F.silu(affine)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        normal, affine, weight, scale, *layout = ctx.saved_tensors
        shape = (*scale.shape[:2], normal.shape[1] // scale.shape[1])
        grad = torch.ops.aten.silu_backward(grad.contiguous(), affine)
        product = grad * normal
        grad_weight, grad_bias = product.sum(0), grad.sum(0)
        grad, product = grad.mul_(weight).view(shape), product.mul_(weight).view(shape)
        # What a shift and a stretch of the whole group would undo is no gradient of its rows.
        shift, stretch = (_spread(_group_means(part, *layout), part, layout[1]) for part in (grad, product))
        grad.sub_(shift).addcmul_(normal.view(shape), stretch, value=-1).mul_(scale)
        return grad.view_as(normal), grad_weight, grad_bias, None, None, None, None


def _group_means(grouped: torch.Tensor, cu_seqlens: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Means over each sequence and group; the rows' sums are added in float64, (N, G) numbers alone.

    *Shape:* (N, G, C / G) -> (S, G) float64.
    """
    size = grouped.shape[2]
    sums = grouped.sum(-1) if size > 1 else grouped.squeeze(-1)
    count = (cu_seqlens.diff().double() * size).clamp(min=1).unsqueeze(1)
    return segment_sum(sums.double(), cu_seqlens, sequences) / count


def _spread(values: torch.Tensor, grouped: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Each row's values of its sequence, in the rows' dtype. *Shape:* (S, G) -> (N, G, 1)."""
    return values.to(grouped.dtype).index_select(0, sequences).unsqueeze(-1)


def glu_conv_group_norm_silu(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    num_groups: int,
    eps: float,
) -> torch.Tensor:
    """See `slam_kernels.glu_conv_group_norm_silu`. Computes in float32, or in float64 for float64 input."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    sequences = row_sequences(cu_seqlens, x.shape[0])
    gated = F.glu(x.to(compute), dim=-1)
    y = _PackedDepthwiseConv.apply(gated, conv_weight.to(compute), cu_seqlens, sequences)
    if conv_bias is not None:
        y = y + conv_bias.to(compute)
    affine = norm_weight.to(compute), norm_bias.to(compute)
    return _PackedGroupNormSiLU.apply(y, *affine, cu_seqlens, sequences, num_groups, eps).to(x.dtype)
