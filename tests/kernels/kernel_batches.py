"""Small packed batches for the operators' tests."""

from __future__ import annotations

import torch

KEY = 0x0123456789ABCDEF - (1 << 63)
BIG_ID = (5 << 32) + 0xFFFFFFF0


def layout(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def examples(count: int, *, first: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (one of them above 32 bits) and epochs (one of them at the limit of 32 bits)."""
    ids = torch.arange(first, first + count)
    epochs = torch.arange(count) % 3
    if count > 1:
        ids[1], epochs[1] = BIG_ID, 0xFFFFFFFF
    return ids, epochs


def convolution_inputs(rows: int, channels: int, taps: int, *, dtype=torch.float32, seed: int = 0, bias: bool = True):
    """x, conv_weight, conv_bias, norm_weight, norm_bias with gradients on; parameters in float32 or better."""
    g = torch.Generator().manual_seed(seed)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape, scale=1.0, shift=0.0, kind=parameter):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale + shift).to(kind).requires_grad_()

    return (
        draw(rows, 2 * channels, kind=dtype),
        draw(channels, taps, scale=0.4),
        draw(channels, scale=0.3) if bias else None,
        draw(channels, scale=0.2, shift=1.0),
        draw(channels, scale=0.2),
    )
