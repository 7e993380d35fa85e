"""PyTorch twin of token corruption: most masked tokens become [MASK], some a random token, some stay."""

from __future__ import annotations

import torch

from .apply_spans import index_counters
from .philox import philox, threshold24


def corrupt_tokens(
    tokens: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    mask_id: int,
    vocab_size: int,
    mask_probability: float,
    random_probability: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `slam_kernels.corrupt_tokens`."""
    index = mask.nonzero().squeeze(1)
    positions, counters, _ = index_counters(index, cu_seqlens, example_ids, epochs)
    fate, draw, _, _ = philox(key, positions, *counters)
    fate = fate >> 8
    random = (draw * vocab_size) >> 32
    kept = tokens.index_select(0, index)
    changed = torch.where(fate < threshold24(mask_probability + random_probability), random, kept)
    changed = torch.where(fate < threshold24(mask_probability), mask_id, changed)
    return tokens.index_copy(0, index, changed), index
