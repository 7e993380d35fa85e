"""Kernel of the token corruption."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.philox import threshold24
from .common import locate_rows, search_steps
from .random import top24, words4


@triton.jit(do_not_specialize=["N", "S", "key", "mask_id", "vocab", "masks", "changes"])
def corrupt_rows(
    TOKENS, MASK, THROUGH, CU, IDS, EPOCHS, OUT, INDEX, N, S, key, mask_id, vocab, masks, changes,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT (N,) and INDEX; below ``masks`` / 2**24 a masked token becomes mask_id, below ``changes`` a random one."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = rows < N
    masked = tl.load(MASK + rows, mask=real, other=0) != 0
    token = tl.load(TOKENS + rows, mask=real, other=0)
    sequence = locate_rows(tl.where(real, rows, 0), CU, S, STEPS)
    example, epoch = tl.load(IDS + sequence), tl.load(EPOCHS + sequence)
    word, draw, _, _ = words4(key, rows - tl.load(CU + sequence), example, epoch)
    fate = top24(word)
    random = (draw.to(tl.int64) * vocab) >> 32
    out = tl.where(masked & (fate < changes), random, token)
    out = tl.where(masked & (fate < masks), mask_id, out)
    tl.store(OUT + rows, out, mask=real)
    place = tl.load(THROUGH + rows, mask=real, other=1) - 1
    tl.store(INDEX + place, rows.to(tl.int64), mask=real & masked)


@torch.library.custom_op("slam_kernels::corrupt_tokens", mutates_args=())
def corrupt_tokens_op(
    tokens: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    example_ids: Tensor,
    epochs: Tensor,
    key: int,
    mask_id: int,
    vocab_size: int,
    masks: int,
    changes: int,
) -> tuple[Tensor, Tensor]:
    """Corrupted tokens (N,) and the masked rows (M,)."""
    rows, sequences = tokens.numel(), example_ids.numel()
    out = torch.empty_like(tokens)
    if rows == 0:
        return out, mask.nonzero().squeeze(1)
    through = mask.cumsum(0)
    index = torch.empty_like(through)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        corrupt_rows[(triton.cdiv(rows, 128),)](
            tokens, mask.view(torch.int8), through, cu_seqlens, example_ids, epochs, out, index,
            rows, sequences, key, mask_id, vocab_size, masks, changes,
            STEPS=search_steps(sequences), BLOCK=128, num_warps=4,
        )  # fmt: skip
    return out, index[: int(through[-1])].clone()


@corrupt_tokens_op.register_fake
def _(tokens, mask, cu_seqlens, example_ids, epochs, key, mask_id, vocab_size, masks, changes):
    count = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(tokens), torch.empty(count, dtype=torch.int64, device=tokens.device)


def corrupt_tokens(
    tokens: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    example_ids: Tensor,
    epochs: Tensor,
    *,
    key: int,
    mask_id: int,
    vocab_size: int,
    mask_probability: float,
    random_probability: float,
) -> tuple[Tensor, Tensor]:
    """See `slam_kernels.corrupt_tokens`."""
    tensors = [t.contiguous() for t in (tokens, mask, cu_seqlens, example_ids, epochs)]
    shares = threshold24(mask_probability), threshold24(mask_probability + random_probability)
    return corrupt_tokens_op(*tensors, key, mask_id, vocab_size, *shares)
