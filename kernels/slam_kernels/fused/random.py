"""Keyed random words and the noise made of them, bit for bit as in `reference.philox` and `reference.elementary`.

Kernels that draw noise are launched with ``enable_fp_fusion=False``: contracting a multiplication and an addition into
one rounds once where the twin rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import elementary

LOG_0, LOG_1, LOG_2, LOG_3, LOG_4, LOG_5, LOG_6, LOG_7, LOG_8 = map(tl.constexpr, elementary.LOG_POLYNOMIAL)
SIN_0, SIN_1, SIN_2 = map(tl.constexpr, elementary.SIN_POLYNOMIAL)
COS_0, COS_1, COS_2 = map(tl.constexpr, elementary.COS_POLYNOMIAL)
LN2_HIGH, LN2_LOW = tl.constexpr(elementary.LN2_HIGH), tl.constexpr(elementary.LN2_LOW)
SQRT_HALF_BITS = tl.constexpr(elementary.SQRT_HALF_BITS)
TURN = tl.constexpr(elementary.TURN)


@triton.jit
def words4(key, c0, example, epoch):
    """Four words (uint32) of Philox4x32-10 for every counter; example and epoch are int64, cut to 64 and 32 bits."""
    zero = (c0 * 0).to(tl.int64)
    return tl.philox(
        key,
        c0.to(tl.int64).to(tl.uint32),
        (zero + (example & 0xFFFFFFFF)).to(tl.uint32),
        (zero + ((example >> 32) & 0xFFFFFFFF)).to(tl.uint32),
        (zero + (epoch & 0xFFFFFFFF)).to(tl.uint32),
    )


@triton.jit
def top24(word):
    return (word >> 8).to(tl.int32)


@triton.jit
def interleave4(a, b, c, d):
    """Columns a0 b0 c0 d0 a1 b1 ... *Shape:* four (R, Q) -> (R, 4 Q)."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def exact_log(x):
    """`reference.elementary.log`."""
    bits = x.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    exponent = (bits >> 23).to(tl.float32)
    r = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    square = r * r
    y = r * 0.0 + LOG_0
    y = y * r + LOG_1
    y = y * r + LOG_2
    y = y * r + LOG_3
    y = y * r + LOG_4
    y = y * r + LOG_5
    y = y * r + LOG_6
    y = y * r + LOG_7
    y = y * r + LOG_8
    y = y * r * square
    y = y + exponent * LN2_LOW
    y = y - square * 0.5
    return r + y + exponent * LN2_HIGH


@triton.jit
def cos_sin_turn(word24):
    """`reference.elementary.cos_sin_turn`."""
    quarter = (word24 + (1 << 21)) >> 22
    x = (word24 - (quarter << 22)).to(tl.float32) * TURN
    square = x * x
    sine = square * 0.0 + SIN_0
    sine = sine * square + SIN_1
    sine = sine * square + SIN_2
    sine = sine * square * x + x
    cosine = square * 0.0 + COS_0
    cosine = cosine * square + COS_1
    cosine = cosine * square + COS_2
    cosine = cosine * square * square - square * 0.5 + 1.0
    odd = (quarter & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(((quarter + 1) & 2) == 2, -cos, cos)
    sin = tl.where((quarter & 2) == 2, -sin, sin)
    return cos, sin


@triton.jit
def open_uniform(word):
    """`reference.elementary.open_uniform`."""
    return ((word >> 9).to(tl.int32) * 2 + 1).to(tl.float32) * (2.0**-24)


@triton.jit
def gaussian_pair(first, second):
    """Two standard normal values of two words."""
    radius = tl.sqrt_rn(exact_log(open_uniform(first)) * -2.0)
    cos, sin = cos_sin_turn(top24(second))
    return radius * cos, radius * sin


@triton.jit
def gumbel(word):
    return -exact_log(-exact_log(open_uniform(word)))
