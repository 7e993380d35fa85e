"""Self-attention over packed rows; :mod:`nemo_slam.modules.attention_backends` computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_slam.modules import fp8
from nemo_slam.modules.attention_backends import AttentionSettings, resolve_backend, sdpa, varlen
from nemo_slam.modules.attention_te import TransformerEngineAttention
from nemo_slam.modules.positions import rotate, rotation
from nemo_slam.packing import SequenceLayout


class PackedSelfAttention(nn.Module):
    """Multi-head self-attention without relative positions, with the parameters of NeMo's ``MultiHeadAttention``.

    It takes the place of ``ConformerLayer.self_attn``; the layer hands it the layout where NeMo's takes a mask.

    Args:
        dropout: on attention weights.
        backend: ``auto``, ``sdpa``, ``varlen`` or ``te``; looked at in forward, since a model may be moved.
        precision: ``none``, ``gemm`` or ``attention``: what runs in FP8.
        rotary: rotate queries and keys by the row's place in its sequence.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float = 0.0,
        backend: str = "auto",
        precision: str = "none",
        rotary: bool = False,
    ):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {n_heads}")
        size = d_model // n_heads
        if rotary and size % 2:
            raise ValueError(f"rotary positions need an even head size (d_model / n_heads), not {size}")
        self.n_heads = n_heads
        self.rotary = rotary
        self.settings = AttentionSettings(backend, precision, n_heads, size, dropout)
        self.linear_q = nn.Linear(d_model, d_model)
        self.linear_k = nn.Linear(d_model, d_model)
        self.linear_v = nn.Linear(d_model, d_model)
        self.linear_out = nn.Linear(d_model, d_model)
        self.products = {"qkv": fp8.Linear(d_model, 3 * d_model), "out": fp8.Linear(d_model, d_model)}
        self.transformer_engine = TransformerEngineAttention(n_heads, size, dropout)

    @property
    def backend(self) -> str:
        """What the config's choice means for the module where it is, in the precision of its weights or of autocast."""
        device = self.linear_q.weight.device
        half = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else self.linear_q.weight.dtype
        return resolve_backend(self.settings, device, dtype)

    def _linear(self, name: str, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.settings.fp8 == "none":
            return F.linear(rows, weight, bias)
        return self.products[name](rows, weight, bias)

    @torch.compiler.disable
    def _attend(self, qkv: Tensor, layout: SequenceLayout) -> Tensor:
        """*Shape:* (N, 3, H, D / H) -> (N, H, D / H)."""
        if self.rotary:
            pairs = rotate(qkv[:, :2], *rotation(layout, qkv.shape[-1]))
            qkv = torch.cat([pairs, qkv[:, 2:]], dim=1)
        backend = resolve_backend(self.settings, qkv.device, qkv.dtype)
        if backend == "te":
            return self.transformer_engine.attend(qkv, layout, self.training)
        dropout = self.settings.dropout if self.training else 0.0
        return (varlen if backend == "varlen" else sdpa)(qkv, layout, dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: SequenceLayout, cache: None = None) -> Tensor:
        """*Shape:* (1, N, D) -> (1, N, D). ``query``, ``key`` and ``value`` are the same rows, as NeMo's layer passes
        them."""
        rows = query.squeeze(0)
        inputs = (self.linear_q, self.linear_k, self.linear_v)
        weight = torch.cat([linear.weight for linear in inputs])  # one product in place of three
        bias = torch.cat([linear.bias for linear in inputs])
        qkv = self._linear("qkv", rows, weight, bias).view(len(rows), 3, self.n_heads, -1)
        out = self._attend(qkv, mask).flatten(1)
        return self._linear("out", out, self.linear_out.weight, self.linear_out.bias).unsqueeze(0)
