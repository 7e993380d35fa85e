"""The masked cross entropy as a ``torch.library`` operator: chunks of logits, one at a time.

The matrix products are the library's; the kernels around them take the softmax in float32. Forward keeps one number a
row (the log-sum-exp), backward computes the logits of a chunk again: one product in four more than keeping them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cross_entropy_kernels as kernels
from .common import compute_dtype, power_of_two

CHUNK_LOGITS = 1 << 25
"""Logits at a time: 128 MiB in float32, about 1,000 rows of a vocabulary of 32,000."""


def chunk_rows(vocab: int) -> int:
    """Rows whose logits are held at once; in 16s, so that every chunk of a vector begins on 16 bytes."""
    return max(CHUNK_LOGITS // max(vocab, 1) // 16 * 16, 16)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with the result in ``dtype``, summed in at least float32 whatever the inputs are."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _constants(vocab: int, bias: Tensor | None, dtype: torch.dtype) -> dict:
    block = power_of_two(vocab, least=16, most=4096)
    return {
        "V": vocab,
        "BLOCK": block,
        "HAS_BIAS": bias is not None,
        "ACC": compute_dtype(dtype)[1],
        "num_warps": 8 if block >= 2048 else 4,
    }


@torch.library.custom_op("slam_kernels::masked_cross_entropy", mutates_args=())
def forward_op(
    hidden: Tensor, index: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_sum (), correct (M,), lse (M,). ``weight`` has hidden's dtype."""
    rows, vocab = index.numel(), weight.shape[0]
    compute, _ = compute_dtype(hidden.dtype)
    losses, lse = (hidden.new_empty(rows, dtype=compute) for _ in range(2))
    correct = hidden.new_empty(rows, dtype=torch.int8)
    constants = _constants(vocab, bias, hidden.dtype)
    chunk = chunk_rows(vocab)
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        logits = _product(hidden.index_select(0, index[part]), weight.t(), compute)
        results = losses[part], lse[part], correct[part]
        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            kernels.cross_entropy_rows[(logits.shape[0],)](
                logits, logits if bias is None else bias, targets[part], *results, **constants
            )
    return losses.sum(), correct.to(torch.bool), lse


@forward_op.register_fake
def _(hidden, index, targets, weight, bias):
    compute, _ = compute_dtype(hidden.dtype)
    rows = index.shape[0]
    return (
        hidden.new_empty((), dtype=compute),
        hidden.new_empty(rows, dtype=torch.bool),
        hidden.new_empty(rows, dtype=compute),
    )


@torch.library.custom_op("slam_kernels::masked_cross_entropy_backward", mutates_args=())
def backward_op(
    grad: Tensor, hidden: Tensor, index: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (N, D) in its dtype, weight (V, D) and bias (V,) in float32 (float64)."""
    rows, vocab = index.numel(), weight.shape[0]
    compute, _ = compute_dtype(hidden.dtype)
    dhidden = torch.zeros_like(hidden)
    dweight = torch.zeros_like(weight, dtype=compute)
    dbias = torch.zeros(vocab, dtype=compute, device=weight.device)
    constants = _constants(vocab, bias, hidden.dtype)
    chunk = chunk_rows(vocab)
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        selected = hidden.index_select(0, index[part])
        logits = _product(selected, weight.t(), compute)
        slopes = torch.empty_like(logits, dtype=hidden.dtype)
        with torch.cuda.device_of(hidden):
            kernels.cross_entropy_gradient[(logits.shape[0],)](
                grad, logits, logits if bias is None else bias, targets[part], lse[part], slopes, **constants
            )
        # The rows of an index are distinct: nothing is added up here, so no order matters.
        dhidden.index_copy_(0, index[part], slopes @ weight)
        dweight += _product(slopes.t(), selected, compute)
        dbias += slopes.sum(0, dtype=compute)
    return dhidden, dweight, dbias


@backward_op.register_fake
def _(grad, hidden, index, targets, weight, bias, lse):
    compute, _ = compute_dtype(hidden.dtype)
    return (
        torch.empty_like(hidden),
        torch.empty_like(weight, dtype=compute),
        weight.new_empty(weight.shape[0], dtype=compute),
    )


def _setup(ctx, inputs, output):
    hidden, index, targets, weight, bias = inputs
    ctx.save_for_backward(hidden, index, targets, weight, bias, output[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    saved = ctx.saved_tensors  # once: under activation checkpointing a second look finds them gone
    *_, weight, bias, _ = saved
    dhidden, dweight, dbias = backward_op(grad, *saved)
    return dhidden, None, None, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


forward_op.register_autograd(_backward, setup_context=_setup)


def masked_cross_entropy(
    hidden: Tensor, index: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `slam_kernels.masked_cross_entropy`. Under autocast the products take its dtype, as a linear layer would."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if hidden.dtype == torch.float64:
        dtype = hidden.dtype
    loss, correct, _ = forward_op(
        hidden.to(dtype).contiguous(),
        index.contiguous(),
        targets.contiguous(),
        weight.to(dtype).contiguous(),
        None if bias is None else bias.contiguous(),
    )
    return loss, correct
