"""Self-attention over packed rows, with interchangeable backends.

A backend is a function ``(q, k, v, layout, dropout) -> out``, all of them (N, H, D / H); it attends inside each
sequence of the layout and returns zeros for the tail. ``sdpa`` runs anywhere: one call of PyTorch's fused attention
for each
block of similar lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_slam.packing import SequenceLayout

AttentionFunction = Callable[[Tensor, Tensor, Tensor, SequenceLayout, float], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, dropout: float) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` block by block. *Shape:* all (N, H, D / H)."""
    heads, size = q.shape[1:]
    outputs = []
    for block in layout.blocks:
        query, key, value = (
            x.index_select(0, block.index).view(block.size, block.width, heads, size).transpose(1, 2) for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=block.mask, dropout_p=dropout)
        outputs.append(out.transpose(1, 2).reshape(-1, heads, size))
    # Tail rows of `inverse` point here. The sum over no rows keeps q, k and v in the graph of a batch without
    # sequences.
    zero = q.new_zeros(1, heads, size) + (q[:0] + k[:0] + v[:0]).sum(0)
    return torch.cat([*outputs, zero]).index_select(0, layout.inverse)


BACKENDS: dict[str, AttentionFunction] = {"sdpa": sdpa}


def resolve_backend(choice: str) -> str:
    """The backend that ``attention: choice`` means here.

    Raises:
        ValueError: the choice is unknown.
    """
    if choice == "auto":
        return "sdpa"
    if choice not in BACKENDS:
        raise ValueError(f"attention: {choice!r} is not one of auto, {', '.join(BACKENDS)}")
    return choice


class PackedSelfAttention(nn.Module):
    """Multi-head self-attention without relative positions, with the parameters of NeMo's ``MultiHeadAttention``.

    It takes the place of ``ConformerLayer.self_attn``; the layer hands it the layout where NeMo's takes a mask.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, backend: str = "auto"):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
        self.n_heads = n_heads
        self.dropout_att = dropout
        self.backend = resolve_backend(backend)
        self.linear_q = nn.Linear(d_model, d_model)
        self.linear_k = nn.Linear(d_model, d_model)
        self.linear_v = nn.Linear(d_model, d_model)
        self.linear_out = nn.Linear(d_model, d_model)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: SequenceLayout, cache: None = None) -> Tensor:
        """*Shape:* (1, N, D) -> (1, N, D). ``query``, ``key`` and ``value`` are the same rows, as NeMo's layer passes
        them."""
        rows = query.squeeze(0)
        q, k, v = (
            linear(rows).unflatten(-1, (self.n_heads, -1)) for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        out = BACKENDS[self.backend](q, k, v, mask, self.dropout_att if self.training else 0.0)
        return self.linear_out(out.flatten(1)).unsqueeze(0)
