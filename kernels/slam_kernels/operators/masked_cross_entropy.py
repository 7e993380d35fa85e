"""Cross entropy of a projection at the masked rows, without their logits in memory."""

from __future__ import annotations

import torch

from ..backend import use_triton
from ..checks import check_index, check_shape
from ..reference.masked_cross_entropy import masked_cross_entropy as _twin

_NAME = "masked_cross_entropy"


def masked_cross_entropy(
    hidden: torch.Tensor,
    index: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the rows at ``index`` of the cross entropy of ``weight @ row + bias`` with the target.

    Args:
        hidden: *Shape:* ``(N, D)``.
        index: *Shape:* ``(M,)`` int64, distinct rows of hidden.
        targets: *Shape:* ``(M,)`` int64 in [0, V).
        weight: *Shape:* ``(V, D)``.
        bias: *Shape:* ``(V,)`` or None.
        backend: ``torch`` (holds the logits) or ``triton`` (does not).

    Returns:
        ``loss_sum`` *Shape:* ``()`` float32 (float64 for float64); M = 0 gives a 0 connected to hidden, weight and
        bias. ``correct`` *Shape:* ``(M,)`` bool: the target has the highest logit, the first of equals.
    """
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"{_NAME}: hidden must be a floating-point (N, D), got {hidden.dtype} {tuple(hidden.shape)}")
    check_index(_NAME, index)
    if targets.dtype != torch.int64:
        raise ValueError(f"{_NAME}: targets must be int64, got {targets.dtype}")
    check_shape(_NAME, "targets", targets, tuple(index.shape))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{_NAME}: weight must be (V, {hidden.shape[1]}), got {tuple(weight.shape)}")
    if bias is not None:
        check_shape(_NAME, "bias", bias, (weight.shape[0],))
    if use_triton(backend, hidden, _NAME):
        from ..fused.masked_cross_entropy import masked_cross_entropy as fused

        return fused(hidden, index, targets, weight, bias)
    return _twin(hidden, index, targets, weight, bias)
