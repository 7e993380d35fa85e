"""Sinusoidal positions (Vaswani et al., 2017, section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoid(positions: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sine in the first half of the columns, cosine in the second, wavelengths from 2 pi to 10000 * 2 pi.

    *Shape:* positions (N,) int64 -> (N, width).
    """
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, device=positions.device, dtype=torch.float32)
        * (-torch.log(torch.tensor(1e4)).item() / max(half - 1, 1))
    )
    angles = positions[:, None].to(torch.float32) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
