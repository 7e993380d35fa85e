"""Kernels that replace masked rows and list them in one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import compute_dtype, locate_rows, power_of_two, search_steps
from .random import gaussian_pair, interleave4, words4


@triton.jit(do_not_specialize=["S", "key"])
def replace_rows(
    X, MASK, THROUGH, CU, IDS, EPOCHS, VECTOR, Y, INDEX, S, key, std,
    D: tl.constexpr, STEPS: tl.constexpr, QUADS: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    """One row and 4 QUADS columns: Y (N, D) from X, or VECTOR (D,), or noise; INDEX gets the row's number.

    THROUGH (N,) counts the masked rows up to and including each row.
    """
    row = tl.program_id(0)
    d = tl.program_id(1) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    here = d < D
    masked = tl.load(MASK + row) != 0
    place = row.to(tl.int64) * D + d
    if masked:
        if LEARNED:
            y = tl.load(VECTOR + d, mask=here, other=0.0).to(Y.dtype.element_ty)
        else:
            sequence = locate_rows(row, CU, S, STEPS)
            example, epoch = tl.load(IDS + sequence), tl.load(EPOCHS + sequence)
            quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
            c0 = (row - tl.load(CU + sequence)).to(tl.int64) * ((D + 3) // 4) + quad
            a, b, c, e = words4(key, c0, example, epoch)
            z0, z1 = gaussian_pair(a, b)
            z2, z3 = gaussian_pair(c, e)
            y = (interleave4(z0, z1, z2, z3) * std).to(Y.dtype.element_ty)
        tl.store(Y + place, y, mask=here)
        if tl.program_id(1) == 0:
            tl.store(INDEX + tl.load(THROUGH + row) - 1, row.to(tl.int64))
    else:
        tl.store(Y + place, tl.load(X + place, mask=here, other=0.0), mask=here)


@triton.jit(do_not_specialize=["N"])
def replace_rows_backward(
    GRAD, MASK, DX, PART, N,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEARNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """DX (N, D) is GRAD with masked rows zeroed; PART (B, D) sums the masked rows of a block."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = (rows < N) & (d < D)
    masked = tl.load(MASK + rows, mask=rows < N, other=0) != 0
    place = rows.to(tl.int64) * D + d
    grad = tl.load(GRAD + place, mask=here, other=0.0)
    tl.store(DX + place, tl.where(masked, 0.0, grad.to(ACC)).to(DX.dtype.element_ty), mask=here)
    if LEARNED:
        total = tl.sum(tl.where(masked, grad.to(ACC), 0.0), axis=0)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(PART + tl.program_id(0).to(tl.int64) * D + column, total, mask=column < D)


@torch.library.custom_op("slam_kernels::apply_spans", mutates_args=())
def forward_op(
    x: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    example_ids: Tensor,
    epochs: Tensor,
    key: int,
    vector: Tensor | None,
    std: float,
) -> tuple[Tensor, Tensor]:
    """Y (N, D) and the masked rows (M,). M is read from the device after the kernel is under way."""
    rows, width = x.shape
    sequences = example_ids.numel()
    y = torch.empty_like(x)
    if rows == 0 or width == 0:
        return y, mask.nonzero().squeeze(1)
    through = mask.cumsum(0)
    index = torch.empty_like(through)
    quads = power_of_two(triton.cdiv(width, 4), least=4, most=256)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        replace_rows[(rows, triton.cdiv(width, 4 * quads))](
            x, mask.view(torch.int8), through, cu_seqlens, example_ids, epochs, x if vector is None else vector, y,
            index, sequences, key, std, D=width, STEPS=search_steps(sequences), QUADS=quads, LEARNED=vector is not None,
            num_warps=4 if quads > 64 else 1, enable_fp_fusion=False,
        )  # fmt: skip
    return y, index[: int(through[-1])].clone()


@forward_op.register_fake
def _(x, mask, cu_seqlens, example_ids, epochs, key, vector, std):
    count = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(x), torch.empty(count, dtype=torch.int64, device=x.device)


@torch.library.custom_op("slam_kernels::apply_spans_backward", mutates_args=())
def backward_op(grad: Tensor, mask: Tensor, learned: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, D) and of the vector (D,) (empty if there is none)."""
    rows, width = grad.shape
    compute, acc = compute_dtype(grad.dtype)
    dx = torch.empty_like(grad)
    columns = power_of_two(width, least=16, most=256)
    blocks = triton.cdiv(rows, 32)
    partials = grad.new_empty(blocks if learned else 0, width, dtype=compute)
    if rows and width:
        with torch.cuda.device_of(grad):
            replace_rows_backward[(blocks, triton.cdiv(width, columns))](
                grad, mask.view(torch.int8), dx, partials, rows,
                D=width, ROWS=32, COLUMNS=columns, LEARNED=learned, ACC=acc, num_warps=4,
            )  # fmt: skip
    return dx, partials.sum(0) if learned else grad.new_empty(0, dtype=compute)


@backward_op.register_fake
def _(grad, mask, learned):
    compute, _ = compute_dtype(grad.dtype)
    return torch.empty_like(grad), grad.new_empty(grad.shape[1] if learned else 0, dtype=compute)


def _setup(ctx, inputs, output):
    _, mask, _, _, _, _, vector, _ = inputs
    ctx.save_for_backward(mask)
    ctx.mark_non_differentiable(output[1])
    ctx.vector_dtype = None if vector is None else vector.dtype


def _backward(ctx, grad, _index):
    (mask,) = ctx.saved_tensors
    learned = ctx.vector_dtype is not None
    dx, dvector = backward_op(grad.contiguous(), mask, learned)
    return dx, None, None, None, None, None, dvector.to(ctx.vector_dtype) if learned else None, None


forward_op.register_autograd(_backward, setup_context=_setup)


def apply_spans(
    x: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    example_ids: Tensor,
    epochs: Tensor,
    *,
    key: int,
    vector: Tensor | None,
    std: float,
) -> tuple[Tensor, Tensor]:
    """See `slam_kernels.apply_spans`."""
    tensors = [t.contiguous() for t in (x, mask, cu_seqlens, example_ids, epochs)]
    return forward_op(*tensors, key, None if vector is None else vector.contiguous(), float(std))
