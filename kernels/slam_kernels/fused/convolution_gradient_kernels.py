"""Backward kernels of the fused convolution module; layout and legend as in `convolution_kernels`.

With n the normalised convolution, u = gamma n + beta and z = silu(u): du = dz silu'(u), and per sequence and group
dy = rstd (gamma du - mean(gamma du) - n mean(gamma du n)). The first pass sums du and du n over rows (they are also the
gradients of beta and gamma), the second computes dy in its rolling window and from it the gradients of X, W and BIAS.
"""

# ruff: noqa: RUF005 - Triton's compiler knows tuple + tuple, not iterable unpacking.

from __future__ import annotations

import triton
import triton.language as tl

from .common import locate_block, sigmoid
from .convolution_kernels import empty_window, filter_taps, gated_row, group_values, weighted


@triton.jit
def silu_slope(u):
    s = sigmoid(u)
    return s * (1.0 + u * (1.0 - s))


@triton.jit(do_not_specialize=["S", "first_block"])
def norm_gradient_partials(
    X, W, BIAS, GAMMA, BETA, CU, MEAN, RSTD, DZ, PART, S, first_block,
    C: tl.constexpr, G: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr, STEPS: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums of du and of du n over a block's rows: PART (B, 2, C). An empty block writes zeros."""
    HALF: tl.constexpr = TAPS // 2
    block = tl.program_id(0)
    c = (first_block + tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
    here = c < C
    sequence, begin, end, first, rows = locate_block(block, CU, S, ROWS, STEPS)
    X += first.to(tl.int64) * (2 * C)
    DZ += first.to(tl.int64) * C
    lowest, highest = begin - first, tl.minimum(end - first, rows + HALF)
    taps = filter_taps(W, c, here, TAPS, ACC)
    shift = -group_values(MEAN, sequence, c, here, C, G, ACC)
    if HAS_BIAS:
        shift += tl.load(BIAS + c, mask=here, other=0.0).to(ACC)
    scale = group_values(RSTD, sequence, c, here, C, G, ACC) * tl.load(GAMMA + c, mask=here, other=0.0).to(ACC)
    beta = tl.load(BETA + c, mask=here, other=0.0).to(ACC)
    window = empty_window(c, TAPS - 1, ACC)
    plain = (c * 0).to(ACC)
    scaled = plain
    steps = tl.where(rows > 0, rows + 2 * HALF, 0)
    base = 0
    while base < steps:
        for u in tl.static_range(UNROLL):
            row = base + u - HALF
            window = window + (gated_row(X, row, (row >= lowest) & (row < highest), c, here, C, ACC),)
            out = row - HALF
            dz = tl.load(DZ + out * C + c, mask=here & ((out >= 0) & (out < rows)), other=0.0).to(ACC)
            centred = weighted(window, taps, shift, TAPS)
            du = dz * silu_slope(centred * scale + beta)
            plain += du
            scaled += du * centred
            window = window[1:]
        base += UNROLL
    PART += block.to(tl.int64) * (2 * C)
    tl.store(PART + c, plain, mask=here)
    # Read again here, the vector takes no registers in the loop; volatile keeps the compiler from merging the reads.
    rstd = tl.load(RSTD + sequence.to(tl.int64) * G + c // (C // G), mask=here, other=0.0, volatile=True).to(ACC)
    tl.store(PART + C + c, scaled * rstd, mask=here)


@triton.jit(do_not_specialize=["first_block"])
def norm_gradient_finish(
    PART, GAMMA, CU, DMEAN, DNORM, first_block,
    C: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Means of gamma du and gamma du n over every sequence's groups: DMEAN and DNORM (S, G)."""
    WIDTH: tl.constexpr = C // G
    sequence = tl.program_id(0)
    group = (first_block + tl.program_id(1)) * GROUPS + tl.arange(0, GROUPS)
    g = group[None, :, None]
    k = tl.arange(0, SIZE)[None, None, :]
    here = (g < G) & (k < WIDTH)
    begin, end = tl.load(CU + sequence), tl.load(CU + sequence + 1)
    PART += (begin // ROWS + sequence).to(tl.int64) * (2 * C) + g * WIDTH + k
    gamma = tl.load(GAMMA + g * WIDTH + k, mask=here, other=0.0).to(ACC)
    blocks = (end - begin + ROWS - 1) // ROWS
    j = tl.arange(0, BLOCKS)[:, None, None]
    plain = tl.zeros([GROUPS], ACC)
    scaled = tl.zeros([GROUPS], ACC)
    base = 0
    while base < blocks:
        b = base + j
        mask = here & (b < blocks)
        plain += tl.sum(tl.sum(tl.load(PART + b.to(tl.int64) * (2 * C), mask=mask, other=0.0) * gamma, axis=2), axis=0)
        scaled += tl.sum(
            tl.sum(tl.load(PART + b.to(tl.int64) * (2 * C) + C, mask=mask, other=0.0) * gamma, axis=2), axis=0
        )
        base += BLOCKS
    count = tl.maximum(end - begin, 1).to(ACC) * WIDTH
    place = sequence.to(tl.int64) * G + group
    tl.store(DMEAN + place, plain / count, mask=group < G)
    tl.store(DNORM + place, scaled / count, mask=group < G)


@triton.jit(do_not_specialize=["S", "first_block"])
def input_gradient(
    X, W, BIAS, GAMMA, BETA, CU, MEAN, RSTD, DZ, DMEAN, DNORM, DX, PART, S, first_block,
    C: tl.constexpr, G: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr, STEPS: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DX (N, 2 C), and a block's part of the gradients of W and BIAS: PART (B, TAPS + 1, C), the bias last.

    Two windows: gated rows, whose convolution gives dy HALF rows behind the newest, and dy, whose transposed
    convolution gives the gated rows' gradient another HALF rows behind. A program recomputes HALF rows of dy on either
    side.
    """
    HALF: tl.constexpr = TAPS // 2
    block = tl.program_id(0)
    c = (first_block + tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
    here = c < C
    sequence, begin, end, first, rows = locate_block(block, CU, S, ROWS, STEPS)
    X += first.to(tl.int64) * (2 * C)
    DX += first.to(tl.int64) * (2 * C)
    DZ += first.to(tl.int64) * C
    lowest, highest = begin - first, tl.minimum(end - first, rows + 2 * HALF)
    taps = filter_taps(W, c, here, TAPS, ACC)
    shift = -group_values(MEAN, sequence, c, here, C, G, ACC)
    if HAS_BIAS:
        shift += tl.load(BIAS + c, mask=here, other=0.0).to(ACC)
    rstd = group_values(RSTD, sequence, c, here, C, G, ACC)
    scale = rstd * tl.load(GAMMA + c, mask=here, other=0.0).to(ACC)
    beta = tl.load(BETA + c, mask=here, other=0.0).to(ACC)
    # dy = rstd (gamma du - dmean - n dnorm) with n = centred rstd.
    fixed = -rstd * group_values(DMEAN, sequence, c, here, C, G, ACC)
    along = -rstd * rstd * group_values(DNORM, sequence, c, here, C, G, ACC)
    window = empty_window(c, TAPS - 1, ACC)
    slopes = empty_window(c, TAPS - 1, ACC)
    filters = empty_window(c, TAPS, ACC)
    offset = (c * 0).to(ACC)
    steps = tl.where(rows > 0, rows + 4 * HALF, 0)
    base = 0
    while base < steps:
        for u in tl.static_range(UNROLL):
            row = base + u - 2 * HALF
            window = window + (gated_row(X, row, (row >= lowest) & (row < highest), c, here, C, ACC),)
            middle = row - HALF
            # The window is full from the third HALF on; before that, and outside the sequence, dy is zero.
            inside = (middle >= tl.maximum(lowest, -HALF)) & (middle < tl.minimum(end - first, rows + HALF))
            dz = tl.load(DZ + middle * C + c, mask=here & inside, other=0.0).to(ACC)
            centred = weighted(window, taps, shift, TAPS)
            du = dz * silu_slope(centred * scale + beta)
            dy = tl.where(inside, du * scale + (centred * along + fixed), 0.0)
            slopes = slopes + (dy,)
            own = tl.where((middle >= 0) & (middle < rows), dy, 0.0)
            offset += own
            summed = ()
            for k in tl.static_range(TAPS):
                summed = summed + (filters[k] + own * window[k],)
            filters = summed
            gated = slopes[TAPS - 1] * taps[0]
            for k in tl.static_range(1, TAPS):
                gated += slopes[TAPS - 1 - k] * taps[k]
            out = middle - HALF
            mask = here & ((out >= 0) & (out < rows))
            # The window's oldest row is the one whose gradient is due; of its gate only the sigmoid is wanted again.
            s = sigmoid(tl.load(X + out * (2 * C) + C + c, mask=mask, other=0.0).to(ACC))
            tl.store(DX + out * (2 * C) + c, (gated * s).to(DX.dtype.element_ty), mask=mask)
            dgate = gated * window[0] * (1.0 - s)
            tl.store(DX + out * (2 * C) + C + c, dgate.to(DX.dtype.element_ty), mask=mask)
            window = window[1:]
            slopes = slopes[1:]
        base += UNROLL
    PART += block.to(tl.int64) * ((TAPS + 1) * C)
    for k in tl.static_range(TAPS):
        tl.store(PART + k * C + c, filters[k], mask=here)
    tl.store(PART + TAPS * C + c, offset, mask=here)
