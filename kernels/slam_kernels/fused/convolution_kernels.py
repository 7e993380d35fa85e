"""Kernels of the fused convolution module: rows roll through registers, every element is gated once.

A program walks down at most ROWS rows of one sequence for COLUMNS channels and keeps the last TAPS gated rows in a
tuple of register vectors. UNROLL rows are taken at a time: their loads go out together, and with UNROLL = TAPS the
window returns to the same registers. Nothing is stored between passes but the statistics: the convolution is computed
anew where it is needed, which costs the bytes of its input (2 C a row) instead of writing and reading its output (C +
C), and leaves it unrounded. A launch covers all channels or, from first_block on, a slice.

Legend: N rows, C channels, G groups, S sequences, B blocks. X (N, 2 C), W (C, TAPS), Z and DZ (N, C), PART (B, 2, C),
MEAN, RSTD, DMEAN, DNORM (S, G). ACC is float32, or float64 for float64 input.
"""

# ruff: noqa: RUF005 - Triton's compiler knows tuple + tuple, not iterable unpacking.

from __future__ import annotations

import triton
import triton.language as tl

from .common import locate_block, sigmoid


@triton.jit
def gated_row(X, row, present, c, here, C: tl.constexpr, ACC: tl.constexpr):
    """GLU of one row, zeros where it is not present. X points at the program's first row."""
    mask = here & present
    value = tl.load(X + row * (2 * C) + c, mask=mask, other=0.0).to(ACC)
    gate = tl.load(X + row * (2 * C) + C + c, mask=mask, other=0.0).to(ACC)
    return value * sigmoid(gate)


@triton.jit
def filter_taps(W, c, here, TAPS: tl.constexpr, ACC: tl.constexpr):
    """The filter as a tuple of TAPS vectors."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps = taps + (tl.load(W + c * TAPS + k, mask=here, other=0.0).to(ACC),)
    return taps


@triton.jit
def empty_window(c, SIZE: tl.constexpr, ACC: tl.constexpr):
    """SIZE vectors of zeros."""
    window = ()
    for _ in tl.static_range(SIZE):
        window = window + ((c * 0).to(ACC),)
    return window


@triton.jit
def weighted(window, taps, start, TAPS: tl.constexpr):
    """``start`` plus the sum of the window's rows times their taps."""
    total = start
    for k in tl.static_range(TAPS):
        total += window[k] * taps[k]
    return total


@triton.jit
def group_values(VALUES, sequence, c, here, C: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr):
    """Each channel's value of its group. VALUES (S, G)."""
    return tl.load(VALUES + sequence.to(tl.int64) * G + c // (C // G), mask=here, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["S", "first_block"])
def statistics_partials(
    X, W, BIAS, CU, PART, S, first_block,
    C: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
    STEPS: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every channel over a block's rows (Welford): PART (B, 2, C).

    An empty block writes zeros.
    """
    HALF: tl.constexpr = TAPS // 2
    block = tl.program_id(0)
    c = (first_block + tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
    here = c < C
    _, begin, end, first, rows = locate_block(block, CU, S, ROWS, STEPS)
    X += first.to(tl.int64) * (2 * C)
    lowest, highest = begin - first, tl.minimum(end - first, rows + HALF)
    taps = filter_taps(W, c, here, TAPS, ACC)
    bias = (c * 0).to(ACC)
    if HAS_BIAS:
        bias = tl.load(BIAS + c, mask=here, other=0.0).to(ACC)
    window = empty_window(c, TAPS - 1, ACC)
    mean = (c * 0).to(ACC)
    squares = mean
    steps = tl.where(rows > 0, rows + 2 * HALF, 0)
    base = 0
    while base < steps:
        for u in tl.static_range(UNROLL):
            row = base + u - HALF
            window = window + (gated_row(X, row, (row >= lowest) & (row < highest), c, here, C, ACC),)
            y = weighted(window, taps, bias, TAPS)
            out = row - HALF
            # The row is number out + 1 of the block, or it does not count.
            share = ((out >= 0) & (out < rows)).to(ACC) / tl.maximum(out + 1, 1).to(ACC)
            change = y - mean
            mean += change * share
            squares += change * change * (share * tl.maximum(out, 0).to(ACC))
            window = window[1:]
        base += UNROLL
    PART += block.to(tl.int64) * (2 * C)
    tl.store(PART + c, mean, mask=here)
    tl.store(PART + C + c, squares, mask=here)


@triton.jit(do_not_specialize=["first_block"])
def statistics_finish(
    PART, CU, MEAN, RSTD, first_block, eps,
    C: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Merges the blocks' and channels' partials of a sequence's groups by Chan's formula: MEAN and RSTD (S, G)."""
    WIDTH: tl.constexpr = C // G
    sequence = tl.program_id(0)
    group = (first_block + tl.program_id(1)) * GROUPS + tl.arange(0, GROUPS)
    g = group[None, :, None]
    k = tl.arange(0, SIZE)[None, None, :]
    here = (g < G) & (k < WIDTH)
    begin, end = tl.load(CU + sequence), tl.load(CU + sequence + 1)
    length = end - begin
    PART += (begin // ROWS + sequence).to(tl.int64) * (2 * C) + g * WIDTH + k
    blocks = (length + ROWS - 1) // ROWS
    j = tl.arange(0, BLOCKS)[:, None, None]
    total = tl.zeros([GROUPS], ACC)
    base = 0
    while base < blocks:
        b = base + j
        mask = here & (b < blocks)
        rows = tl.minimum(length - b * ROWS, ROWS).to(ACC)
        mean = tl.load(PART + b.to(tl.int64) * (2 * C), mask=mask, other=0.0)
        total += tl.sum(tl.sum(mean * tl.where(b < blocks, rows, 0.0), axis=2), axis=0)
        base += BLOCKS
    count = tl.maximum(length, 1).to(ACC) * WIDTH
    centre = total / count
    squares = tl.zeros([GROUPS], ACC)
    base = 0
    while base < blocks:
        b = base + j
        mask = here & (b < blocks)
        rows = tl.minimum(length - b * ROWS, ROWS).to(ACC)
        mean = tl.load(PART + b.to(tl.int64) * (2 * C), mask=mask, other=0.0)
        own = tl.load(PART + b.to(tl.int64) * (2 * C) + C, mask=mask, other=0.0)
        apart = mean - centre[None, :, None]
        squares += tl.sum(tl.sum(tl.where(mask, own + rows * apart * apart, 0.0), axis=2), axis=0)
        base += BLOCKS
    place = sequence.to(tl.int64) * G + group
    tl.store(MEAN + place, centre, mask=group < G)
    tl.store(RSTD + place, 1.0 / tl.sqrt(squares / count + eps), mask=group < G)


@triton.jit(do_not_specialize=["S", "first_block"])
def normalise(
    X, W, BIAS, GAMMA, BETA, CU, MEAN, RSTD, Z, S, first_block,
    C: tl.constexpr, G: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr, STEPS: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Z = silu(group_norm(conv(glu(X)))) with known statistics."""
    HALF: tl.constexpr = TAPS // 2
    block = tl.program_id(0)
    c = (first_block + tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
    here = c < C
    sequence, begin, end, first, rows = locate_block(block, CU, S, ROWS, STEPS)
    X += first.to(tl.int64) * (2 * C)
    Z += first.to(tl.int64) * C
    lowest, highest = begin - first, tl.minimum(end - first, rows + HALF)
    taps = filter_taps(W, c, here, TAPS, ACC)
    # The mean leaves the bias before anything is added to either: a common offset costs no digits.
    shift = -group_values(MEAN, sequence, c, here, C, G, ACC)
    if HAS_BIAS:
        shift += tl.load(BIAS + c, mask=here, other=0.0).to(ACC)
    scale = group_values(RSTD, sequence, c, here, C, G, ACC) * tl.load(GAMMA + c, mask=here, other=0.0).to(ACC)
    beta = tl.load(BETA + c, mask=here, other=0.0).to(ACC)
    window = empty_window(c, TAPS - 1, ACC)
    steps = tl.where(rows > 0, rows + 2 * HALF, 0)
    base = 0
    while base < steps:
        for u in tl.static_range(UNROLL):
            row = base + u - HALF
            window = window + (gated_row(X, row, (row >= lowest) & (row < highest), c, here, C, ACC),)
            h = weighted(window, taps, shift, TAPS) * scale + beta
            out = row - HALF
            z = (h * sigmoid(h)).to(Z.dtype.element_ty)
            tl.store(Z + out * C + c, z, mask=here & ((out >= 0) & (out < rows)))
            window = window[1:]
        base += UNROLL
