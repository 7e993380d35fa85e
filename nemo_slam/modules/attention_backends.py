"""What computes attention inside each sequence of a packed batch, and which of them a config means on a machine.

A backend takes ``qkv`` (N, 3, H, D / H) and the layout, and returns (N, H, D / H): softmax attention inside each
sequence. Rows of the tail are finite, and nobody reads them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_slam.modules import fp8
from nemo_slam.modules.attention_blocks import bounded_blocks, from_blocks, to_blocks
from nemo_slam.packing import SequenceLayout
from slam_kernels import BackendError

CHOICES = ("auto", "sdpa", "varlen", "te")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionSettings:
    """What the choice of a backend depends on besides the machine.

    Attributes:
        choice: the config's ``attention``.
        fp8: the config's ``fp8``.
        heads, head_size: H and D / H.
        dropout: on attention weights, in training.
    """

    choice: str = "auto"
    fp8: str = "none"
    heads: int = 8
    head_size: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ValueError(f"attention: {self.choice!r} is not one of {', '.join(CHOICES)}")
        fp8.check_config(self.fp8, self.choice, self.head_size, self.dropout)


def sdpa(qkv: Tensor, layout: SequenceLayout, dropout: float) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, once for each block of similar lengths. Runs anywhere."""
    if not layout.blocks:
        return qkv.sum(1) * 0  # a batch without sequences: zeros that keep qkv in the graph
    heads, size = qkv.shape[2:]
    outputs = []
    gathered = to_blocks(qkv.flatten(1), layout.inverse, layout.num_valid, [block.index for block in layout.blocks])
    for block, rows in zip(layout.blocks, gathered, strict=True):
        parts = rows.view(block.size, block.width, 3, heads, size).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=block.mask, dropout_p=dropout)
        outputs.append(out.transpose(1, 2).reshape(-1, heads, size))
    return from_blocks(outputs, layout.inverse, layout.num_valid)


@functools.lru_cache
def _packed_attention() -> Callable | None:
    """PyTorch's, which every version that this project runs on has, if it was built with it."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def varlen(qkv: Tensor, layout: SequenceLayout, dropout: float) -> Tensor:
    """Packed attention: no block, no padding. The tail attends to itself, so that its rows are finite."""
    attend = _packed_attention()
    assert attend is not None
    longest = int(layout.lengths.max())
    query, key, value = qkv.unbind(1)
    return attend(query, key, value, layout.cu_seqlens, layout.cu_seqlens, longest, longest)


def varlen_unavailable(settings: AttentionSettings, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why packed attention cannot run; None if it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"packed attention runs on CUDA devices, not on {device.type!r}"
    if dtype not in HALF:
        return f"packed attention takes bfloat16 or float16, not {dtype} (trainer.precision=bf16-mixed)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0 (Ampere)"
    if settings.head_size % 8 or settings.head_size > 256:
        return f"the head size must be a multiple of 8 up to 256, not {settings.head_size}"
    if settings.dropout > 0:
        return f"packed attention has no dropout, dropout_att is {settings.dropout}"
    if _packed_attention() is None:
        return "this torch has no torch.nn.attention.varlen"
    return None


def te_unavailable(settings: AttentionSettings, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Transformer Engine's attention cannot run; None if it can."""
    if dtype not in HALF:
        where = fp8.transformer_engine_unavailable(device)
        return where or f"it takes bfloat16 or float16, not {dtype} (trainer.precision=bf16-mixed)"
    return fp8.unavailable(settings.fp8, device)


@functools.lru_cache
def resolve_backend(settings: AttentionSettings, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that a config means for tensors of ``dtype`` on ``device``.

    ``auto`` is ``te`` with FP8 attention, else ``varlen`` where it can run, else ``sdpa``.

    Raises:
        BackendError: an explicit choice, or FP8 attention, that cannot be had here; the message says why.
    """
    choice = settings.choice
    if choice == "te" or settings.fp8 == "attention":
        reason = te_unavailable(settings, device, dtype)
        if reason is not None:
            asked = "fp8=attention" if settings.fp8 == "attention" else "attention=te"
            raise BackendError(
                f"model.conformer.{asked} on {device}: {reason}. Use model.conformer.attention=auto and "
                "model.conformer.fp8=none."
            )
        return "te"
    if choice == "sdpa":
        return "sdpa"
    reason = varlen_unavailable(settings, device, dtype)
    if choice == "varlen" and reason is not None:
        raise BackendError(
            f"model.conformer.attention=varlen on {device}: {reason}. Use model.conformer.attention=auto or sdpa."
        )
    return "sdpa" if reason is not None else "varlen"


def attended_positions(backend: str, layout: SequenceLayout) -> int:
    """Positions that a backend computes for a layout, what it pads included; known without a sync."""
    if backend == "te":
        return sum(block.size * block.width for block in bounded_blocks(layout).blocks)
    return layout.num_rows if backend == "varlen" else layout.block_positions
