"""Logarithm, sine and cosine out of float32 multiplications and additions alone.

Library functions differ in their last bit between NumPy, PyTorch on either device and Triton (whose fast logarithm has
no relative accuracy near 1, where Gumbel noise needs it). These are Cephes' polynomials, in one fixed order, so that
noise is the same bits everywhere as long as nothing contracts a multiplication and an addition into one.
"""

from __future__ import annotations

import torch

LOG_POLYNOMIAL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
SIN_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SQRT_HALF_BITS = 0x3F3504F3
TURN = 3.7450702829238413e-07
"""2 pi / 2**24, the angle of one step of a 24-bit turn."""


def _horner(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive, normal float32, within 2 units in the last place (relative, also near 1)."""
    # x = mantissa * 2**exponent with the mantissa in [sqrt(1/2), sqrt(2)), by moving bits.
    bits = x.view(torch.int32) - SQRT_HALF_BITS
    exponent = (bits >> 23).to(torch.float32)
    mantissa = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    r = mantissa - 1.0
    square = r * r
    y = _horner(LOG_POLYNOMIAL, r) * r * square
    y = y + exponent * LN2_LOW
    y = y - square * 0.5
    return r + y + exponent * LN2_HIGH


def cos_sin_turn(word24: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of ``2 pi word24 / 2**24`` for integers in [0, 2**24), as float32."""
    quarter = (word24 + (1 << 21)) >> 22
    x = (word24 - (quarter << 22)).to(torch.float32) * TURN
    square = x * x
    sine = _horner(SIN_POLYNOMIAL, square) * square * x + x
    cosine = _horner(COS_POLYNOMIAL, square) * square * square - square * 0.5 + 1.0
    odd = (quarter & 1) == 1
    cos = torch.where(odd, sine, cosine)
    sin = torch.where(odd, cosine, sine)
    cos = torch.where(((quarter + 1) & 2) == 2, -cos, cos)
    sin = torch.where((quarter & 2) == 2, -sin, sin)
    return cos, sin


def open_uniform(words: torch.Tensor) -> torch.Tensor:
    """A float32 strictly between 0 and 1, exact, from the top 23 bits of each word."""
    return ((words >> 9) * 2 + 1).to(torch.float32) * 2.0**-24


def gaussian(words: torch.Tensor) -> torch.Tensor:
    """Box-Muller: standard normal float32, two neighbouring words make two. *Shape:* ``(..., 2 n)`` -> the same."""
    first, second = words[..., 0::2], words[..., 1::2]
    # PyTorch's float32 square root is not always the nearest float32 and depends on the tensor's size; by way of
    # float64 it is the nearest, which is what other devices give.
    radius = (log(open_uniform(first)) * -2.0).double().sqrt().float()
    cos, sin = cos_sin_turn(second >> 8)
    return torch.stack((radius * cos, radius * sin), dim=-1).flatten(-2)


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise -log(-log u) as float32, one for each word."""
    return -log(-log(open_uniform(words)))
