"""A stack of NeMo Conformer layers over packed rows."""

from __future__ import annotations

from dataclasses import dataclass

from nemo.collections.asr.parts.submodules.conformer_modules import ConformerLayer
from torch import Tensor, nn

from nemo_slam.modules.attention import PackedSelfAttention
from nemo_slam.modules.convolution import PackedConvolution
from nemo_slam.packing import SequenceLayout


@dataclass(frozen=True)
class ConformerConfig:
    """A Conformer layer (SLAM, section 3.1: width 1024, feed-forward 4096, 8 heads, kernel 5, GroupNorm).

    Attributes:
        dropout: on feed-forward and residual branches.
        dropout_att: on attention weights; 0 because FP8 attention demands it.
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


class PackedConformerLayer(ConformerLayer):
    """NeMo's ``ConformerLayer`` (its forward, its parameter names) with attention and convolution that read a
    layout."""

    def __init__(self, config: ConformerConfig):
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
        self.self_attn = PackedSelfAttention(config.d_model, config.n_heads, config.dropout_att, config.attention)
        self.conv = PackedConvolution(
            config.d_model, config.conv_kernel_size, config.conv_norm_groups, config.conv_norm_eps, config.kernels
        )


class ConformerStack(nn.ModuleList):
    """``num_layers`` Conformer layers. *Shape:* rows (N, D) and their layout -> rows (N, D)."""

    def __init__(self, config: ConformerConfig, num_layers: int):
        super().__init__(PackedConformerLayer(config) for _ in range(num_layers))

    def forward(self, rows: Tensor, layout: SequenceLayout) -> Tensor:
        x = rows.unsqueeze(0)
        for layer in self:
            x = layer(x, att_mask=layout, pad_mask=layout)
        return x.squeeze(0)
