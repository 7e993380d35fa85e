"""Philox4x32-10: random words as a pure function of (key, counter), the same on every device.

Counters are (position or block, example id low, example id high, epoch), all uint32 held in int64 tensors. Everything
drawn here is either an integer comparison or float32 arithmetic of single multiplications and additions, so that NumPy,
PyTorch and Triton agree bit for bit.
"""

from __future__ import annotations

import torch

MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
BUDGET_COUNTER = MASK32
"""Counter 0 of the word that rounds a sequence's budget: no row has this position."""


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def stream_key(seed: int, purpose: int) -> int:
    """The 64-bit key of one use of randomness, as a signed integer.

    Args:
        seed: the run's seed.
        purpose: a number of its own for every use (span starts of speech, Gumbel noise, ...): no two share words.

    >>> stream_key(0, 1) != stream_key(1, 0)
    True
    """
    key = _splitmix64(_splitmix64(seed & _MASK64) ^ _splitmix64((purpose & _MASK64) ^ 0x5851F42D4C957F2D))
    return key - (1 << 64) if key >= 1 << 63 else key


def threshold24(probability: float) -> int:
    """The integer below which the top 24 bits of a word fall with this probability."""
    return round(probability * (1 << 24))


def philox(
    key: int, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random words for every counter.

    Args:
        key: 64 bits, signed or not (`stream_key`).
        c0, c1, c2, c3: uint32 values in int64 tensors that broadcast together.

    Returns:
        Four int64 tensors of the broadcast shape, each word in [0, 2**32).
    """
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(10):
        # The int64 product wraps as two's complement: its low half is right, and the mask drops the shifted-in sign.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = (b >> 32) & MASK32 ^ c1 ^ k0, b & MASK32, (a >> 32) & MASK32 ^ c3 ^ k1, a & MASK32
        k0, k1 = (k0 + _KEY_A) & MASK32, (k1 + _KEY_B) & MASK32
    return c0, c1, c2, c3


def example_counters(
    example_ids: torch.Tensor, epochs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counters 1 to 3 of each example: id low, id high, epoch. *Shape:* all ``(S,)`` int64."""
    return example_ids & MASK32, (example_ids >> 32) & MASK32, epochs & MASK32


def grid_words(
    positions: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, columns: int, *, key: int
) -> torch.Tensor:
    """One word for each (row, column): four neighbouring columns share a counter.

    *Shape:* ``positions``, ``c1``, ``c2``, ``c3`` ``(M,)`` -> ``(M, columns)`` int64.
    """
    blocks = -(-columns // 4)
    c0 = positions[:, None] * blocks + torch.arange(blocks, device=positions.device)
    words = philox(key, c0, c1[:, None], c2[:, None], c3[:, None])
    return torch.stack(words, dim=-1).view(positions.numel(), blocks * 4)[:, :columns]
