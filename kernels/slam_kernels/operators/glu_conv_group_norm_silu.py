"""The convolution module's middle, fused: from the first pointwise projection's output to the second's input."""

from __future__ import annotations

import torch

from ..backend import use_triton
from ..checks import check_layout, check_shape
from ..reference.glu_conv_group_norm_silu import glu_conv_group_norm_silu as _twin

_NAME = "glu_conv_group_norm_silu"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_CHANNELS, MAX_TAPS = 4096, 31


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
    backend: str = "torch",
) -> torch.Tensor:
    """GLU, zero-padded "same" depthwise convolution, GroupNorm, affine and SiLU of every packed sequence by itself.

    The statistics of a sequence are those of its own rows: it gets the same output alone or in any batch, which is what
    stock NeMo's ``ConformerConvolution`` computes between its two pointwise convolutions on that sequence alone.

    Args:
        x: *Shape:* ``(N, 2 C)``, values first, gates second; float32, bfloat16, float16 or float64.
        conv_weight: *Shape:* ``(C, K)``, K odd and at most 31.
        conv_bias: *Shape:* ``(C,)`` or None.
        norm_weight, norm_bias: *Shape:* ``(C,)``.
        cu_seqlens: *Shape:* ``(S + 1,)`` int32 from 0 to N; sequences may be empty.
        num_groups: divides C.
        eps: added to the variance.
        backend: ``torch`` or ``triton``.

    Returns:
        *Shape:* ``(N, C)`` in x's dtype. Arithmetic and statistics are float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, ``num_groups`` or ``cu_seqlens`` that does not fit.
    """
    if x.dim() != 2 or x.shape[1] % 2 or x.dtype not in _DTYPES:
        raise ValueError(f"{_NAME}: x must be a floating-point (N, 2 C), got {x.dtype} {tuple(x.shape)}")
    channels = x.shape[1] // 2
    if conv_weight.dim() != 2 or conv_weight.shape[0] != channels or conv_weight.shape[1] % 2 == 0:
        raise ValueError(f"{_NAME}: conv_weight must be ({channels}, K) with K odd, got {tuple(conv_weight.shape)}")
    if conv_weight.shape[1] > MAX_TAPS or channels > MAX_CHANNELS:
        raise ValueError(
            f"{_NAME}: at most {MAX_CHANNELS} channels and {MAX_TAPS} taps, got {channels} and {conv_weight.shape[1]}"
        )
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{_NAME}: num_groups={num_groups} must divide the {channels} channels")
    for name, value in (("conv_bias", conv_bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is not None:
            check_shape(_NAME, name, value, (channels,))
    check_layout(_NAME, cu_seqlens, x.shape[0])
    parameters = (conv_weight, conv_bias, norm_weight, norm_bias)
    if use_triton(backend, x, _NAME):
        from ..fused.glu_conv_group_norm_silu import glu_conv_group_norm_silu as fused

        return fused(x, *parameters, cu_seqlens, num_groups=num_groups, eps=eps)
    return _twin(x, *parameters, cu_seqlens, num_groups=num_groups, eps=eps)
