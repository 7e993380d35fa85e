"""PyTorch twin of the convolution module's middle: GLU, depthwise convolution, GroupNorm, SiLU for each sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .packed import row_sequences, segment_expand, segment_sum


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
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            total = grad_spaced[half : half + span] * taps[half]
            for tap in range(taps.shape[0]):
                if tap != half:
                    total.addcmul_(grad_spaced[2 * half - tap : 2 * half - tap + span], taps[tap])
            grad_rows = total.index_select(0, place - half)
        if ctx.needs_input_grad[1]:
            inner = grad_spaced[half : half + span]
            products = [(spaced[tap : tap + span] * inner).sum(0) for tap in range(taps.shape[0])]
            grad_weight = torch.stack(products, dim=1)
        return grad_rows, grad_weight, None, None


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
    rows, channels = x.shape[0], x.shape[1] // 2
    sequences = row_sequences(cu_seqlens, rows)
    gated = F.glu(x.to(compute), dim=-1)
    y = _PackedDepthwiseConv.apply(gated, conv_weight.to(compute), cu_seqlens, sequences)
    if conv_bias is not None:
        y = y + conv_bias.to(compute)

    # Two passes, mean first: the squares of deviations are summed, never a difference of large sums. A sequence's sums
    # of its rows' sums are float64, (N, G) numbers alone.
    grouped = y.view(rows, num_groups, channels // num_groups)
    count = (cu_seqlens.diff().double() * (channels // num_groups)).clamp(min=1).unsqueeze(1)
    mean = segment_sum(grouped.sum(-1).double(), cu_seqlens, sequences) / count
    centred = grouped - segment_expand(mean.to(compute), cu_seqlens, sequences).unsqueeze(-1)
    variance = segment_sum(centred.square().sum(-1).double(), cu_seqlens, sequences) / count
    scale = segment_expand((variance + eps).rsqrt().to(compute), cu_seqlens, sequences)
    normal = (centred * scale.unsqueeze(-1)).view(rows, channels)
    return F.silu(torch.addcmul(norm_bias.to(compute), normal, norm_weight.to(compute))).to(x.dtype)
