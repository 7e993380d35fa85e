"""A stack of NeMo Conformer layers over packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from nemo.collections.asr.parts.submodules.conformer_modules import ConformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo_slam.modules import fp8
from nemo_slam.modules.attention import PackedSelfAttention
from nemo_slam.modules.attention_backends import AttentionSettings, attended_positions
from nemo_slam.modules.convolution import PackedConvolution
from nemo_slam.packing import SequenceLayout


@dataclass(frozen=True)
class ConformerConfig:
    """A Conformer layer (SLAM, section 3.1: width 1024, feed-forward 4096, 8 heads, kernel 5, GroupNorm).

    Attributes:
        dropout: on feed-forward and residual branches.
        dropout_att: on attention weights; 0 because FP8 attention demands it.
        attention: ``auto``, ``sdpa``, ``varlen`` (packed) or ``te`` (Transformer Engine).
        fp8: ``none``; ``gemm``, feed-forward and projections in FP8; ``attention``, that and attention.
        activation_checkpointing: keep a layer's input alone and compute the layer again in the backward.
        compile: ``torch.compile`` each layer but its attention; the number of rows is free, so nothing is compiled
            again for another batch.
    """

    d_model: int = 1024
    d_ff: int = 4096
    n_heads: int = 8
    conv_kernel_size: int = 5
    conv_norm_groups: int = 32
    conv_norm_eps: float = 1e-3
    dropout: float = 0.1
    dropout_att: float = 0.0
    attention: str = "auto"
    kernels: str = "auto"
    fp8: str = "none"
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.d_model < 1 or self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}), both positive")
        AttentionSettings(self.attention, self.fp8, self.n_heads, self.d_model // self.n_heads, self.dropout_att)
        if self.fp8 != "none" and (self.d_model % fp8.MULTIPLE or self.d_ff % fp8.MULTIPLE):
            raise ValueError(
                f"fp8: {self.fp8} needs d_model and d_ff to be multiples of {fp8.MULTIPLE}, not {self.d_model} and "
                f"{self.d_ff}"
            )


class Projection(nn.Linear):
    """A linear layer of NeMo's with its product in FP8; the same parameters under the same names."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.products = {"product": fp8.Linear(linear.in_features, linear.out_features)}

    def forward(self, input: Tensor) -> Tensor:
        """*Shape:* (1, N, in) -> (1, N, out)."""
        return self.products["product"](input.squeeze(0), self.weight, self.bias).unsqueeze(0)


class PackedConformerLayer(ConformerLayer):
    """NeMo's ``ConformerLayer`` (its forward, its parameter names) with attention and convolution that read a
    layout."""

    def __init__(self, config: ConformerConfig, rotary: bool = False):
        super().__init__(
            d_model=config.d_model,
            d_ff=config.d_ff,
            self_attention_model="abs_pos",
            n_heads=config.n_heads,
            conv_kernel_size=config.conv_kernel_size,
            conv_norm_type=f"group_norm{config.conv_norm_groups}",
            dropout=config.dropout,
            dropout_att=config.dropout_att,
        )
        self.self_attn = PackedSelfAttention(
            config.d_model, config.n_heads, config.dropout_att, config.attention, config.fp8, rotary
        )
        self.conv = PackedConvolution(
            config.d_model, config.conv_kernel_size, config.conv_norm_groups, config.conv_norm_eps, config.kernels
        )
        if config.fp8 != "none":
            self.conv.use_fp8()
            for feed_forward in (self.feed_forward1, self.feed_forward2):
                feed_forward.linear1 = Projection(feed_forward.linear1)
                feed_forward.linear2 = Projection(feed_forward.linear2)


class ConformerStack(nn.ModuleList):
    """``num_layers`` Conformer layers. *Shape:* rows (N, D) and their layout -> rows (N, D)."""

    def __init__(self, config: ConformerConfig, num_layers: int, rotary: bool = False):
        super().__init__(PackedConformerLayer(config, rotary) for _ in range(num_layers))
        self.fp8 = config.fp8
        self.activation_checkpointing = config.activation_checkpointing
        self.register_load_state_dict_pre_hook(_drop_extra_state)
        if config.compile:
            for layer in self:
                layer.compile(dynamic=True)

    def forward(self, rows: Tensor, layout: SequenceLayout) -> Tensor:
        if self.fp8 != "none" and len(rows) % fp8.MULTIPLE:
            raise ValueError(
                f"fp8: {self.fp8} needs rows in multiples of {fp8.MULTIPLE}, got {len(rows)}: set pad_multiple to one"
            )
        x = rows.unsqueeze(0)
        with fp8.region(self.fp8, rows.device):
            for layer in self:
                x = self._run(layer, x, layout)
        return x.squeeze(0)

    def attended_positions(self, layout: SequenceLayout) -> int:
        """Positions that attention computes in each layer for a layout, padding included; 0 without layers."""
        attention: Any = self[0].self_attn if len(self) else None
        return 0 if attention is None else attended_positions(attention.backend, layout)

    def _run(self, layer: nn.Module, x: Tensor, layout: SequenceLayout) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return layer(x, att_mask=layout, pad_mask=layout)

        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return run(x)
        if self.fp8 != "none":
            return fp8.checkpoint(run, x)
        return checkpoint(run, x, use_reentrant=False)


def _drop_extra_state(module: nn.Module, weights: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """Weights saved from modules of Transformer Engine itself carry their scales, which are no weights."""
    for name in [name for name in weights if name.startswith(prefix) and name.endswith("._extra_state")]:
        del weights[name]
