"""Transformer Engine's attention on packed rows: a padded call for each class of lengths."""

from __future__ import annotations

from torch import Tensor

from nemo_slam.modules import fp8
from nemo_slam.modules.attention_blocks import bounded_blocks, from_blocks, to_blocks
from nemo_slam.packing import SequenceLayout


class TransformerEngineAttention(dict[str, fp8.Borrower]):
    """``te.DotProductAttention``, one for each width of :func:`bounded_blocks`, made when that width first comes.

    In FP8 a module keeps the scales of its tensors, and must run once in a step: so each width has its own.
    """

    def __init__(self, heads: int, head_size: int, dropout: float):
        super().__init__()
        self.heads, self.head_size, self.dropout = heads, head_size, dropout

    def __missing__(self, width: str) -> fp8.Borrower:
        self[width] = fp8.Borrower(self._make)
        return self[width]

    def __deepcopy__(self, memo: dict) -> TransformerEngineAttention:
        return TransformerEngineAttention(self.heads, self.head_size, self.dropout)

    def _make(self):
        return fp8.load().DotProductAttention(
            self.heads,
            self.head_size,
            attention_dropout=self.dropout,
            qkv_format="bshd",
            attn_mask_type="padding",
        )

    def attend(self, qkv: Tensor, layout: SequenceLayout, training: bool) -> Tensor:
        """*Shape:* (N, 3, H, D / H) -> (N, H, D / H). In FP8 inside :func:`fp8.region` of ``attention``."""
        plan = bounded_blocks(layout)
        if not plan.blocks:
            return qkv.sum(1) * 0  # a batch without sequences: zeros that keep qkv in the graph
        indices = [block.index for block in plan.blocks]
        parts = [to_blocks(part, plan.inverse, layout.num_valid, indices) for part in qkv.unbind(1)]
        outputs = []
        for block, *rows in zip(plan.blocks, *parts, strict=True):
            query, key, value = (x.view(block.size, block.width, self.heads, self.head_size) for x in rows)
            attention = self[str(block.width)].module()
            if attention.training != training:
                attention.train(training)
            out = attention(
                query,
                key,
                value,
                cu_seqlens_q=block.cu_seqlens,
                cu_seqlens_kv=block.cu_seqlens,
                max_seqlen_q=block.width,
                max_seqlen_kv=block.width,
            )
            outputs.append(out.reshape(-1, self.heads, self.head_size))
        return from_blocks(outputs, plan.inverse, layout.num_valid)
