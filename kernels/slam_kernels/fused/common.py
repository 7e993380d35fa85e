"""What the kernels share: finding a row's or a block's sequence, and launching."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Logistic function within 4e-7 in float32: five instructions, where a division and `tl.exp` take twelve.

    A power of two and a reciprocal square root are single instructions of a GPU; their relative errors are 2**-22.
    """
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-x))
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def locate_block(block, CU, S, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """The sequence and the rows of a block of at most ROWS rows, none of which leaves its sequence.

    Sequence s owns the blocks from cu[s] // ROWS + s: a closed form that leaves every sequence room for
    ceil(length / ROWS) blocks, so no table has to be built and no length read by the host. Some blocks stay empty.

    Returns (sequence, its first row, its end, first row of the block, rows in the block or 0).
    """
    low = block * 0
    high = low + (S - 1)
    for _ in range(STEPS):
        middle = (low + high + 1) // 2
        inside = tl.load(CU + middle) // ROWS + middle <= block
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    begin = tl.load(CU + low)
    end = tl.load(CU + low + 1)
    first = begin + (block - begin // ROWS - low) * ROWS
    rows = tl.maximum(tl.minimum(end - first, ROWS), 0)
    return low, begin, end, first, rows


@triton.jit
def locate_rows(rows, CU, S, STEPS: tl.constexpr):
    """The sequence of each row: the first whose end lies beyond it, so that empty sequences own none."""
    low = rows * 0
    high = low + (S - 1)
    for _ in range(STEPS):
        middle = (low + high) // 2
        beyond = tl.load(CU + middle + 1) > rows
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, tl.minimum(middle + 1, S - 1))
    return low


def block_count(num_rows: int, sequences: int, rows_per_block: int) -> int:
    """Blocks that `locate_block` may hand out."""
    return num_rows // rows_per_block + sequences


def search_steps(sequences: int) -> int:
    """Halvings that bring ``sequences`` candidates down to one; more of them change nothing.

    In fours, since a kernel is compiled for each number: batches of 17 to 256 sequences share one.
    """
    return max(-(-max(sequences - 1, 0).bit_length() // 4) * 4, 4)


def power_of_two(value: int, *, least: int = 1, most: int = 1 << 30) -> int:
    """The next power of two, within bounds."""
    return min(max(triton.next_power_of_2(value), least), most)


def compute_dtype(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The type of arithmetic and statistics, in torch's and Triton's words."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)
