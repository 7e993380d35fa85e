"""BERT's corruption of masked tokens: 80% [MASK], 10% a random token, 10% unchanged."""

from __future__ import annotations

import torch

from ..backend import use_triton
from ..checks import check_examples, check_layout, check_probability, check_shape
from ..reference.corrupt_tokens import corrupt_tokens as _twin

_NAME = "corrupt_tokens"


def corrupt_tokens(
    tokens: torch.Tensor,
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    *,
    key: int,
    mask_id: int,
    vocab_size: int,
    mask_probability: float = 0.8,
    random_probability: float = 0.1,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrupts masked tokens and lists them.

    Args:
        tokens: *Shape:* ``(N,)`` int64.
        mask: *Shape:* ``(N,)`` bool (`sample_spans`).
        cu_seqlens: *Shape:* ``(S + 1,)`` int32.
        example_ids, epochs: *Shape:* ``(S,)`` int64.
        key: `stream_key` of the seed and this use.
        mask_id: the token that stands for "masked".
        vocab_size: random tokens are uniform in [0, vocab_size), at most 2**31.
        mask_probability, random_probability: of a masked token; the rest stays as it is.
        backend: ``torch`` or ``triton``.

    Returns:
        The corrupted tokens, *Shape:* ``(N,)`` int64, and ``index`` *Shape:* ``(M,)`` int64, the masked rows ascending.
    """
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"{_NAME}: tokens must be int64 (N,), got {tokens.dtype} {tuple(tokens.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{_NAME}: mask must be bool, got {mask.dtype}")
    check_shape(_NAME, "mask", mask, (tokens.shape[0],))
    check_probability(_NAME, "mask_probability", mask_probability)
    check_probability(_NAME, "random_probability", random_probability)
    check_probability(_NAME, "mask_probability + random_probability", round(mask_probability + random_probability, 9))
    if not 1 <= vocab_size <= 1 << 31:
        raise ValueError(f"{_NAME}: vocab_size={vocab_size} must lie in [1, 2**31]")
    check_layout(_NAME, cu_seqlens, tokens.shape[0])
    check_examples(_NAME, cu_seqlens, example_ids, epochs)
    options = {
        "key": key,
        "mask_id": mask_id,
        "vocab_size": vocab_size,
        "mask_probability": mask_probability,
        "random_probability": random_probability,
    }
    if use_triton(backend, tokens, _NAME):
        from ..fused.corrupt_tokens import corrupt_tokens as fused

        return fused(tokens, mask, cu_seqlens, example_ids, epochs, **options)
    return _twin(tokens, mask, cu_seqlens, example_ids, epochs, **options)
