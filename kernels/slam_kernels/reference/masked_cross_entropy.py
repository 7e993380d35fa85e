"""PyTorch twin of the masked cross entropy: gathered rows, projection, cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def masked_cross_entropy(
    hidden: torch.Tensor,
    index: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `slam_kernels.masked_cross_entropy`. Holds the (M, V) logits."""
    rows = hidden.index_select(0, index)
    logits = F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    # index_select and linear keep an empty selection connected to hidden, weight and bias.
    loss = (logits.logsumexp(-1) - logits.gather(1, targets.unsqueeze(1)).squeeze(1)).sum()
    return loss, logits.argmax(-1) == targets
