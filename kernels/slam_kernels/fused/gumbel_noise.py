"""Kernel of the keyed Gumbel noise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import locate_rows, power_of_two, search_steps
from .random import gumbel, interleave4, words4


@triton.jit(do_not_specialize=["M", "S", "key"])
def draw_gumbel(
    INDEX, CU, IDS, EPOCHS, OUT, M, S, key,
    NUM: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """OUT (M, NUM)."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = m < M
    row = tl.load(INDEX + m, mask=real, other=0)
    sequence = locate_rows(row.to(tl.int32), CU, S, STEPS)
    position = row - tl.load(CU + sequence)
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    c0 = position[:, None] * ((NUM + 3) // 4) + quad[None, :]
    example, epoch = tl.load(IDS + sequence)[:, None], tl.load(EPOCHS + sequence)[:, None]
    a, b, c, d = words4(key, c0, example, epoch)
    noise = interleave4(gumbel(a), gumbel(b), gumbel(c), gumbel(d))
    column = (tl.program_id(1) * (4 * QUADS) + tl.arange(0, 4 * QUADS))[None, :]
    place = m[:, None].to(tl.int64) * NUM + column
    tl.store(OUT + place, noise.to(OUT.dtype.element_ty), mask=real[:, None] & (column < NUM))


@torch.library.custom_op("slam_kernels::gumbel_noise", mutates_args=())
def gumbel_noise_op(
    index: Tensor, cu_seqlens: Tensor, example_ids: Tensor, epochs: Tensor, key: int, num: int, dtype: torch.dtype
) -> Tensor:
    """Noise (M, num)."""
    count, sequences = index.numel(), example_ids.numel()
    out = index.new_empty(count, num, dtype=dtype)
    if count:
        quads = power_of_two(triton.cdiv(num, 4), most=128)
        with torch.cuda.device_of(index):  # Triton launches on the current device
            draw_gumbel[(triton.cdiv(count, 4), triton.cdiv(num, 4 * quads))](
                index, cu_seqlens, example_ids, epochs, out, count, sequences, key,
                NUM=num, STEPS=search_steps(sequences), ROWS=4, QUADS=quads, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out


@gumbel_noise_op.register_fake
def _(index, cu_seqlens, example_ids, epochs, key, num, dtype):
    return index.new_empty(index.shape[0], num, dtype=dtype)


def gumbel_noise(
    index: Tensor,
    cu_seqlens: Tensor,
    example_ids: Tensor,
    epochs: Tensor,
    *,
    key: int,
    num: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `slam_kernels.gumbel_noise`."""
    tensors = [t.contiguous() for t in (index, cu_seqlens, example_ids, epochs)]
    return gumbel_noise_op(*tensors, key, num, dtype)
