"""The random-projection quantizer: frozen targets for masked prediction (BEST-RQ, Chiu et al., 2022, 2202.01855)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 4096
"""Rows at a time: (CHUNK, K) similarities are held, not (M, K)."""


@dataclass(frozen=True)
class RandomProjectionConfig:
    """Attributes:
    num_codes, code_dim: one codebook (BEST-RQ, section 3.1: 8192 entries of width 16).
    """

    num_codes: int = 8192
    code_dim: int = 16


class RandomProjectionQuantizer(nn.Module):
    """The code of a frame is the entry nearest to its random projection, both of unit length.

    It reads the log-mel frames that a row of the encoder covers, not the front end's output: a projection of something
    that is trained would move, and could collapse. Projection and codebook never change; as buffers they are part of a
    checkpoint, and no optimizer sees them. The input must be normalised, or all frames would get a handful of codes:
    ``model.preprocessor.normalize`` does that for each utterance.

    Args:
        feat_in: columns of a row, the mel channels times the frames it covers.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(self, config: RandomProjectionConfig, feat_in: int):
        super().__init__()
        self.config = config
        projection = torch.empty(feat_in, config.code_dim)
        nn.init.xavier_uniform_(projection)
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", F.normalize(torch.randn(config.num_codes, config.code_dim), dim=1))

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """*Shape:* normalised log-mel (M, feat_in) -> codes (M,) int64.

        Between vectors of unit length the nearest in L2 is the one of largest inner product, and the length of the
        projected row changes no order.
        """
        with torch.autocast(rows.device.type, enabled=False):
            projected = rows.to(self.projection.dtype) @ self.projection
            codes = [(part @ self.codebook.t()).argmax(dim=1) for part in projected.split(CHUNK)]
        return torch.cat(codes) if codes else rows.new_zeros(0, dtype=torch.int64)
