"""Gumbel noise for the quantizer as a pure function of (key, example, epoch, row, column)."""

from __future__ import annotations

import torch

from ..backend import use_triton
from ..checks import check_examples, check_index
from ..reference.gumbel_noise import gumbel_noise as _twin

_NAME = "gumbel_noise"


def gumbel_noise(
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    num: int,
    dtype: torch.dtype,
    backend: str = "torch",
) -> torch.Tensor:
    """Standard Gumbel noise, -log(-log u) with u strictly between 0 and 1.

    Args:
        index: *Shape:* ``(M,)`` int64 rows of the packed batch.
        cu_seqlens: *Shape:* ``(S + 1,)`` int32.
        example_ids, epochs: *Shape:* ``(S,)`` int64.
        key: `stream_key` of the seed and this use.
        num: columns (codes times codebooks).
        dtype: of the result; drawn in float32 and then rounded.
        backend: ``torch`` or ``triton``.

    Returns:
        *Shape:* ``(M, num)``, the same bits on any device and in any batch.
    """
    check_index(_NAME, index)
    if num < 1:
        raise ValueError(f"{_NAME}: num={num} must be at least 1")
    if not dtype.is_floating_point:
        raise ValueError(f"{_NAME}: dtype={dtype} must be a floating-point type")
    check_examples(_NAME, cu_seqlens, example_ids, epochs)
    if use_triton(backend, index, _NAME):
        from ..fused.gumbel_noise import gumbel_noise as fused

        return fused(index, cu_seqlens, example_ids, epochs, key=key, num=num, dtype=dtype)
    return _twin(index, cu_seqlens, example_ids, epochs, key=key, num=num, dtype=dtype)
