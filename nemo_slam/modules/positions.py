"""Positions: sinusoids that are added (Vaswani et al., 2017, section 3.5), rotations of queries and keys (Su et al.,
2021)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nemo_slam.packing import SequenceLayout, ranges, to_device


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


def rotary_angles(places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of place * 10000^(-2 i / size). *Shape:* (N,) int64 -> two of (N, size / 2) float32."""
    powers = torch.arange(0, size, 2, device=places.device, dtype=torch.float32) / size
    angles = places[:, None].to(torch.float32) * torch.exp(powers * -np.log(1e4))
    return angles.cos(), angles.sin()


def rotation(layout: SequenceLayout, size: int) -> tuple[Tensor, Tensor]:
    """:func:`rotary_angles` of each row's place in its own sequence, for ``rotate`` on (N, 2, H, size); made once a
    layout. *Shape:* two of (N, 1, 1, size / 2)."""
    cache = vars(layout).setdefault("_rotation", {})
    if size not in cache:
        places = ranges(np.zeros(len(layout.lengths), np.int64), layout.lengths)
        cosine, sine = rotary_angles(to_device(places, layout.cu_seqlens.device), size)
        cache[size] = cosine[:, None, None], sine[:, None, None]
    return cache[size]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + size / 2}) of the last axis; float32 inside, or float64 for float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    cosine, sine = cosine.to(wide), sine.to(wide)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
