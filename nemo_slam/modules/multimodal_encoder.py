"""Multimodal encoder: M Conformer layers over speech, text, or [CLS] speech text (SLAM, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemo_slam.modules.conformer import ConformerConfig, ConformerStack
from nemo_slam.modules.positions import sinusoid
from nemo_slam.packing import SequenceLayout

POSITIONS = ("none", "sinusoidal", "rotary")


@dataclass(frozen=True)
class MultimodalEncoderConfig:
    """Attributes:
    num_layers: Conformer layers (M).
    speech_positions: positions of speech (unknown in the paper): ``none``; ``sinusoidal``, added at the input; or
        ``rotary``: in every layer, queries and keys of all rows are rotated by their place in their sequence. Text
        has sinusoids of its own in any case.
    modality_embedding: add a learned vector for each modality (unknown in the paper).
    """

    num_layers: int = 16
    speech_positions: str = "sinusoidal"
    modality_embedding: bool = True

    def __post_init__(self) -> None:
        if self.speech_positions not in POSITIONS:
            raise ValueError(f"speech_positions: {self.speech_positions!r} is not one of {', '.join(POSITIONS)}")


class MultimodalEncoder(nn.Module):
    """Adds positions and modality to the rows of each front end, then runs the shared layers over the packed batch."""

    def __init__(self, config: MultimodalEncoderConfig, conformer: ConformerConfig):
        super().__init__()
        self.speech_positions = config.speech_positions
        width = conformer.d_model
        self.cls = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.modality = nn.Parameter(torch.zeros(2, width)) if config.modality_embedding else None
        self.dropout = nn.Dropout(conformer.dropout)
        self.layers = ConformerStack(conformer, config.num_layers, rotary=config.speech_positions == "rotary")

    def embed_speech(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Projected speech (N, D) and its frame numbers (N,) -> multimodal input rows (N, D)."""
        if self.speech_positions == "sinusoidal":
            rows = rows + sinusoid(positions, rows.shape[-1], rows.dtype)
        return self.dropout(rows if self.modality is None else rows + self.modality[0].to(rows.dtype))

    def embed_text(self, rows: Tensor) -> Tensor:
        """Text encoder rows (N, D), which carry positions already -> multimodal input rows (N, D)."""
        return rows if self.modality is None else rows + self.modality[1].to(rows.dtype)

    def forward(self, rows: Tensor, layout: SequenceLayout) -> Tensor:
        """*Shape:* rows (N, D) -> rows (N, D)."""
        return self.layers(rows, layout)
