"""PyTorch twin of the distractor sampler: other masked rows of the same sequence, uniform, with replacement."""

from __future__ import annotations

import torch

from .apply_spans import index_counters
from .philox import grid_words


def sample_distractors(
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    num: int,
) -> torch.Tensor:
    """See `slam_kernels.sample_distractors`."""
    positions, counters, sequences = index_counters(index, cu_seqlens, example_ids, epochs)
    # How many masked rows lie before each sequence: index is ascending.
    bounds = torch.searchsorted(index, cu_seqlens.to(torch.int64))
    first = bounds.index_select(0, sequences).unsqueeze(1)
    others = bounds.index_select(0, sequences + 1).unsqueeze(1) - first - 1
    own = torch.arange(index.numel(), device=index.device).unsqueeze(1)
    draw = first + ((grid_words(positions, *counters, num, key=key) * others) >> 32)
    draw = draw + (draw >= own)
    return torch.where(others > 0, draw, -1)
