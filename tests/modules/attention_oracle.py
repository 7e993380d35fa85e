"""Attention written out for one sequence at a time."""

from __future__ import annotations

import math

import torch


def attention(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """*Shape:* (N, 3, H, d) -> (sum of lengths, H, d): softmax attention inside each sequence."""
    outputs, start = [], 0
    for length in lengths:
        q, k, v = qkv[start : start + length].permute(1, 2, 0, 3)
        outputs.append(((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs) if outputs else qkv[:0, 0]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of one sequence (T, H, d): at place t pair i turns by t * 10000^(-2 i / d)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * 1e4 ** -(
        torch.arange(half, dtype=torch.float64) / half
    )
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None].to(pairs.dtype)
    return torch.cat([turned.real, turned.imag], dim=-1)
