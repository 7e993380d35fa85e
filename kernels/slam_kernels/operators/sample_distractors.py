"""Distractors of the contrastive loss: other masked rows of the same sequence."""

from __future__ import annotations

import torch

from ..backend import use_triton
from ..checks import check_examples, check_index
from ..reference.sample_distractors import sample_distractors as _twin

_NAME = "sample_distractors"


def sample_distractors(
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    num: int,
    backend: str = "torch",
) -> torch.Tensor:
    """Draws, for every masked row, ``num`` other masked rows of its sequence, uniformly with replacement.

    A function of (key, example, epoch, row within the sequence, column) and of the sequence's masked rows: the batch
    does not matter. Memory is the output's; nothing of M x M is built.

    Args:
        index: *Shape:* ``(M,)`` int64, masked rows in ascending order (`apply_spans`).
        cu_seqlens: *Shape:* ``(S + 1,)`` int32.
        example_ids, epochs: *Shape:* ``(S,)`` int64.
        key: `stream_key` of the seed and this use.
        num: distractors a row.
        backend: ``torch`` or ``triton``.

    Returns:
        *Shape:* ``(M, num)`` int64, places in ``index`` (0 to M - 1), never the row itself; -1 where the sequence has
        fewer than two masked rows.
    """
    check_index(_NAME, index)
    if num < 1:
        raise ValueError(f"{_NAME}: num={num} must be at least 1")
    check_examples(_NAME, cu_seqlens, example_ids, epochs)
    if use_triton(backend, index, _NAME):
        from ..fused.sample_distractors import sample_distractors as fused

        return fused(index, cu_seqlens, example_ids, epochs, key=key, num=num)
    return _twin(index, cu_seqlens, example_ids, epochs, key=key, num=num)
