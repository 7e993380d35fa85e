"""Masked rows replaced by a learned vector or by random vectors, with the list of masked rows."""

from __future__ import annotations

import torch

from ..backend import use_triton
from ..checks import check_examples, check_layout, check_shape
from ..reference.apply_spans import apply_spans as _twin

_NAME = "apply_spans"


def apply_spans(
    x: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    vector: torch.Tensor | None,
    std: float,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces masked rows and lists them.

    Args:
        x: *Shape:* ``(N, D)``.
        mask: *Shape:* ``(N,)`` bool (`sample_spans`).
        cu_seqlens: *Shape:* ``(S + 1,)`` int32.
        example_ids, epochs: *Shape:* ``(S,)`` int64.
        key: `stream_key` of the seed and this use; unused with a vector.
        vector: *Shape:* ``(D,)``: masked rows become it, and it receives their gradient. None: masked rows become
            ``std`` times Gaussian noise, a function of (key, example, epoch, row within the sequence, column) alone.
        std: of the random rows; unused with a vector.
        backend: ``torch`` or ``triton``.

    Returns:
        ``y`` *Shape:* ``(N, D)`` in x's dtype, whose gradient to x is zero on masked rows; and ``index`` *Shape:*
        ``(M,)`` int64, the masked rows in ascending order (its length needs one device synchronisation).
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{_NAME}: x must be a floating-point (N, D), got {x.dtype} {tuple(x.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{_NAME}: mask must be bool, got {mask.dtype}")
    check_shape(_NAME, "mask", mask, (x.shape[0],))
    if vector is not None:
        check_shape(_NAME, "vector", vector, (x.shape[1],))
    check_layout(_NAME, cu_seqlens, x.shape[0])
    check_examples(_NAME, cu_seqlens, example_ids, epochs)
    if use_triton(backend, x, _NAME):
        from ..fused.apply_spans import apply_spans as fused

        return fused(x, mask, cu_seqlens, example_ids, epochs, key=key, vector=vector, std=std)
    return _twin(x, mask, cu_seqlens, example_ids, epochs, key=key, vector=vector, std=std)
