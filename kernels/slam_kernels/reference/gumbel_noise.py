"""PyTorch twin of keyed Gumbel noise."""

from __future__ import annotations

import torch

from .apply_spans import index_counters
from .elementary import gumbel
from .philox import grid_words


def gumbel_noise(
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    num: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `slam_kernels.gumbel_noise`."""
    positions, counters, _ = index_counters(index, cu_seqlens, example_ids, epochs)
    return gumbel(grid_words(positions, *counters, num, key=key)).to(dtype)
