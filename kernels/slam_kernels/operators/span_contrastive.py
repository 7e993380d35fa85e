"""The contrastive loss of wav2vec 2.0 and w2v-BERT: the true target among distractors of the same sequence."""

from __future__ import annotations

import torch

from ..backend import use_triton
from ..checks import check_shape
from ..reference.span_contrastive import span_contrastive as _twin

_NAME = "span_contrastive"


def span_contrastive(
    contexts: torch.Tensor,
    targets: torch.Tensor,
    distractors: torch.Tensor,
    *,
    temperature: float,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over rows of -log softmax of the positive among [positive, distractors], logits cosine / temperature.

    Args:
        contexts: *Shape:* ``(M, D)``, the encoder's output at the masked rows.
        targets: *Shape:* ``(M, D)``, the quantized vector of each of these rows.
        distractors: *Shape:* ``(M, K)`` int64 rows of ``targets``, -1 for none (`sample_distractors`).
        temperature: divides the cosines.
        backend: ``torch`` or ``triton``.

    Returns:
        ``loss_sum`` *Shape:* ``()`` float32 (float64 for float64), differentiable in contexts and targets; a row
        without distractors adds 0, M = 0 gives a 0 that is connected to both. ``correct`` *Shape:* ``(M,)`` bool: the
        positive is more similar than every distractor, by over 2**-18 of cosine, lest rounding tell it from
        an equal vector; False for rows without distractors (leave those out of averages).
    """
    if contexts.dim() != 2 or not contexts.is_floating_point():
        raise ValueError(
            f"{_NAME}: contexts must be a floating-point (M, D), got {contexts.dtype} {tuple(contexts.shape)}"
        )
    check_shape(_NAME, "targets", targets, tuple(contexts.shape))
    if distractors.dim() != 2 or distractors.shape[0] != contexts.shape[0] or distractors.dtype != torch.int64:
        raise ValueError(
            f"{_NAME}: distractors must be int64 ({contexts.shape[0]}, K),"
            f" got {distractors.dtype} {tuple(distractors.shape)}"
        )
    if distractors.shape[1] < 1:
        raise ValueError(f"{_NAME}: at least one distractor a row (-1 where there is none), got K = 0")
    if not temperature > 0:
        raise ValueError(f"{_NAME}: temperature={temperature} must be positive")
    if use_triton(backend, contexts, _NAME):
        from ..fused.span_contrastive import span_contrastive as fused

        return fused(contexts, targets, distractors, temperature=temperature)
    return _twin(contexts, targets, distractors, temperature=temperature)
