"""PyTorch twin of masking: masked rows become a learned vector or random vectors."""

from __future__ import annotations

import torch

from .elementary import gaussian
from .philox import example_counters, grid_words


def index_counters(
    index: torch.Tensor, cu_seqlens: torch.Tensor, example_ids: torch.Tensor, epochs: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """What randomness of selected rows depends on.

    *Shape:* ``index`` ``(M,)`` -> positions within the sequence, counters 1 to 3, sequences, ``(M,)`` each.
    """
    # Ends, not begins, so that empty sequences own no row.
    sequences = torch.searchsorted(cu_seqlens[1:].to(torch.int64), index, right=True)
    positions = index - cu_seqlens.to(torch.int64).index_select(0, sequences)
    c1, c2, c3 = (c.index_select(0, sequences) for c in example_counters(example_ids, epochs))
    return positions, (c1, c2, c3), sequences


def random_rows(
    index: torch.Tensor,
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    columns: int,
    std: float,
) -> torch.Tensor:
    """Gaussian rows for the rows at ``index``. *Shape:* ``(M,)`` -> ``(M, columns)`` float32."""
    positions, counters, _ = index_counters(index, cu_seqlens, example_ids, epochs)
    words = grid_words(positions, *counters, columns + columns % 2, key=key)
    return gaussian(words)[:, :columns] * std


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `slam_kernels.apply_spans`."""
    index = mask.nonzero().squeeze(1)
    if vector is not None:
        return torch.where(mask.unsqueeze(1), vector.to(x.dtype), x), index
    rows = random_rows(index, cu_seqlens, example_ids, epochs, key=key, columns=x.shape[1], std=std)
    return x.index_copy(0, index, rows.to(x.dtype)), index
