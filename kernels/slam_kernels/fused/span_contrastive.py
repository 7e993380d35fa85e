"""The contrastive loss as a ``torch.library`` operator.

Holds (M, K) logits between forward and backward and, in the backward, the (M K,) places sorted by target: the gradient
of a target is a sum over its list in a fixed order, where a scatter would need atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import contrastive_kernels as kernels
from .common import compute_dtype, power_of_two

MAX_WIDTH = 8192


def _constants(width: int, num: int, dtype: torch.dtype) -> dict:
    """A gathered tile of at most 8,192 numbers: 64 registers a thread."""
    padded = power_of_two(width, least=16)
    return {
        "D": width,
        "K": num,
        "WIDTH": padded,
        "GATHER": power_of_two(num, least=1, most=max(8192 // padded, 1)),
        "ACC": compute_dtype(dtype)[1],
        "num_warps": 4,
    }


@torch.library.custom_op("slam_kernels::span_contrastive", mutates_args=())
def forward_op(
    contexts: Tensor, targets: Tensor, distractors: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_sum (), correct (M,), and for the backward logits (M, K), lse, own, context and target scales (M,)."""
    rows, width = contexts.shape
    num = distractors.shape[1]
    compute, acc = compute_dtype(contexts.dtype)
    logits = contexts.new_empty(rows, num, dtype=compute)
    context_scale, target_scale, lse, own, losses = (contexts.new_empty(rows, dtype=compute) for _ in range(5))
    correct = contexts.new_empty(rows, dtype=torch.int8)
    if rows:
        constants = _constants(width, num, contexts.dtype)
        padded = constants["WIDTH"]
        with torch.cuda.device_of(contexts):  # Triton launches on the current device
            for vectors, scale in ((contexts, context_scale), (targets, target_scale)):
                kernels.inverse_lengths[(rows,)](vectors, scale, D=width, WIDTH=padded, ACC=acc, num_warps=4)
            kernels.contrastive_rows[(rows,)](
                contexts, targets, distractors, context_scale, target_scale, logits, lse, own, losses, correct,
                1.0 / temperature, **constants,
            )  # fmt: skip
    return losses.sum(), correct.to(torch.bool), logits, lse, own, context_scale, target_scale


@forward_op.register_fake
def _(contexts, targets, distractors, temperature):
    compute, _ = compute_dtype(contexts.dtype)
    rows = contexts.shape[0]
    vectors = [contexts.new_empty(rows, dtype=compute) for _ in range(4)]
    return (
        contexts.new_empty((), dtype=compute),
        contexts.new_empty(rows, dtype=torch.bool),
        contexts.new_empty(rows, distractors.shape[1], dtype=compute),
        *vectors,
    )


@torch.library.custom_op("slam_kernels::span_contrastive_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    contexts: Tensor,
    targets: Tensor,
    distractors: Tensor,
    logits: Tensor,
    lse: Tensor,
    own: Tensor,
    context_scale: Tensor,
    target_scale: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of contexts and targets (M, D), in their dtypes."""
    rows, width = contexts.shape
    dcontexts, dtargets = torch.empty_like(contexts), torch.empty_like(targets)
    if rows:
        constants = _constants(width, distractors.shape[1], contexts.dtype)
        shared = (context_scale, target_scale, logits, lse, own)
        with torch.cuda.device_of(contexts):
            kernels.context_gradient[(rows,)](
                grad, contexts, targets, distractors, *shared, dcontexts, 1.0 / temperature, **constants
            )
        # Places fit 32 bits up to 2**31 rows: half the bytes for the sort. It is stable, so equal targets keep order.
        drawn, order = torch.sort(distractors.reshape(-1).to(torch.int32), stable=True)
        bounds = torch.searchsorted(drawn, torch.arange(rows + 1, dtype=torch.int32, device=drawn.device))
        with torch.cuda.device_of(contexts):
            kernels.target_gradient[(rows,)](
                grad, contexts, targets, order, bounds, *shared, dtargets, 1.0 / temperature, **constants
            )
    return dcontexts, dtargets


@backward_op.register_fake
def _(grad, contexts, targets, distractors, logits, lse, own, context_scale, target_scale, temperature):
    return torch.empty_like(contexts), torch.empty_like(targets)


def _setup(ctx, inputs, output):
    contexts, targets, distractors, temperature = inputs
    ctx.save_for_backward(contexts, targets, distractors, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.temperature = temperature


def _backward(ctx, grad, *_):
    return *backward_op(grad, *ctx.saved_tensors, ctx.temperature), None, None


forward_op.register_autograd(_backward, setup_context=_setup)


def span_contrastive(
    contexts: Tensor, targets: Tensor, distractors: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """See `slam_kernels.span_contrastive`."""
    if contexts.shape[1] > MAX_WIDTH:
        raise ValueError(f"span_contrastive: the Triton kernel takes at most {MAX_WIDTH} columns: use backend='torch'")
    # One dtype for both: float64 arithmetic if either asks for it is not wanted, contexts decide.
    loss, correct, *_ = forward_op(
        contexts.contiguous(), targets.to(contexts.dtype).contiguous(), distractors.contiguous(), temperature
    )
    return loss, correct
