"""Kernel of the distractor sampler."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import locate_rows, power_of_two, search_steps
from .random import interleave4, words4


@triton.jit(do_not_specialize=["M", "S", "key"])
def draw_distractors(
    INDEX, BOUNDS, CU, IDS, EPOCHS, OUT, M, S, key,
    NUM: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """OUT (M, NUM): places in INDEX. BOUNDS (S + 1,) counts the masked rows before each sequence."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = m < M
    row = tl.load(INDEX + m, mask=real, other=0)
    sequence = locate_rows(row.to(tl.int32), CU, S, STEPS)
    first = tl.load(BOUNDS + sequence)
    others = (tl.load(BOUNDS + sequence + 1) - first - 1)[:, None]
    position = row - tl.load(CU + sequence)
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    c0 = position[:, None] * ((NUM + 3) // 4) + quad[None, :]
    example, epoch = tl.load(IDS + sequence)[:, None], tl.load(EPOCHS + sequence)[:, None]
    a, b, c, d = words4(key, c0, example, epoch)
    words = interleave4(a, b, c, d)
    draw = first[:, None] + ((words.to(tl.int64) * others) >> 32)
    draw += (draw >= m[:, None]).to(tl.int64)
    column = (tl.program_id(1) * (4 * QUADS) + tl.arange(0, 4 * QUADS))[None, :]
    place = m[:, None].to(tl.int64) * NUM + column
    tl.store(OUT + place, tl.where(others > 0, draw, -1), mask=real[:, None] & (column < NUM))


@torch.library.custom_op("slam_kernels::sample_distractors", mutates_args=())
def sample_distractors_op(
    index: Tensor, cu_seqlens: Tensor, example_ids: Tensor, epochs: Tensor, key: int, num: int
) -> Tensor:
    """Distractors (M, num) int64."""
    count, sequences = index.numel(), example_ids.numel()
    out = index.new_empty(count, num)
    if count:
        bounds = torch.searchsorted(index, cu_seqlens.to(torch.int64))
        quads = power_of_two(triton.cdiv(num, 4), most=32)
        with torch.cuda.device_of(index):  # Triton launches on the current device
            draw_distractors[(triton.cdiv(count, 8), triton.cdiv(num, 4 * quads))](
                index, bounds, cu_seqlens, example_ids, epochs, out, count, sequences, key,
                NUM=num, STEPS=search_steps(sequences), ROWS=8, QUADS=quads, num_warps=4,
            )  # fmt: skip
    return out


@sample_distractors_op.register_fake
def _(index, cu_seqlens, example_ids, epochs, key, num):
    return index.new_empty(index.shape[0], num)


def sample_distractors(
    index: Tensor, cu_seqlens: Tensor, example_ids: Tensor, epochs: Tensor, *, key: int, num: int
) -> Tensor:
    """See `slam_kernels.sample_distractors`."""
    tensors = [t.contiguous() for t in (index, cu_seqlens, example_ids, epochs)]
    return sample_distractors_op(*tensors, key, num)
