"""Text encoder: token embedding plus sinusoidal positions, then LayerNorm (SLAM, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nemo_slam.modules.positions import sinusoid


@dataclass(frozen=True)
class TextEncoderConfig:
    """Attributes:
    vocab_size: rows of the embedding for SentencePiece tokens; the [MASK] row comes on top.
    """

    vocab_size: int = 32000
    dropout: float = 0.1


class TextEncoder(nn.Module):
    """One embedding serves input and output (tied); its last row is [MASK], which no tokenizer has to know."""

    def __init__(self, config: TextEncoderConfig, d_model: int):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.mask_id = config.vocab_size
        self.num_pieces = config.vocab_size  # the tokenizer's, which may have fewer
        self.embedding = nn.Embedding(config.vocab_size + 1, d_model)
        # Unit variance after the scaling below, and logits of order one where the output projection shares the weight.
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def output_weight(self) -> Tensor:
        """The tied output projection (V, D): all rows but [MASK]."""
        return self.embedding.weight[: self.vocab_size]

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """*Shape:* token ids (N,) and their positions (N,), restarting at 0 in every text -> rows (N, D)."""
        rows = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return self.dropout(self.norm(rows + sinusoid(positions, rows.shape[-1], rows.dtype)))
