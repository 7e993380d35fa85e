"""Text to a label: the pre-trained text encoder with a linear layer, for GLUE-style classification."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn

from nemo_slam.finetuning.sentences import Sentences
from nemo_slam.finetuning.text_model import TextBatch, TextModel, pad

POOLS = ("mean", "cls")


class SLAMClassificationModel(TextModel):
    """Classes of a text, or of a pair of texts.

    Keys of the config node: those of `TextModel`; ``labels`` (a list of names), ``pool`` (``mean`` over the rows, or
    the row of ``cls`` [?]) and ``dropout`` before the linear layer.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.labels = [str(label) for label in self.cfg.labels]
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"model.labels: expected two or more different names, got {self.labels}")
        if self.cfg.pool not in POOLS:
            raise ValueError(f"model.pool: {self.cfg.pool!r} is not one of {', '.join(POOLS)}")
        if self.encoder.settings.cls != (self.cfg.pool == "cls"):
            raise ValueError("model.encoder.cls must be true where model.pool is cls, and false otherwise")
        self.head = nn.Sequential(nn.Dropout(self.cfg.dropout), nn.Linear(self.encoder.d_model, len(self.labels)))

    def collate(self, sentences: Sentences) -> TextBatch:
        """Source tokens (B, U) and lengths (B, k), classes (B,), and ones (B,)."""
        classes = torch.as_tensor(np.array([target[0] for target in sentences.targets], np.int64))
        return pad(sentences.tokens, 0)[0], torch.from_numpy(sentences.lengths), classes, torch.ones_like(classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """*Shape:* tokens (B, U), lengths (B, k) -> logits (B, classes)."""
        hidden, sizes = self.encoder(tokens, lengths)
        if self.cfg.pool == "cls":
            return self.head(hidden[:, 0])
        # Padding is zero, so the sum is that of the rows.
        return self.head(hidden.sum(dim=1) / sizes.to(hidden.device)[:, None])

    def losses(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        tokens, lengths, classes, ones = batch
        return F.cross_entropy(self(tokens, lengths).float(), classes, reduction="sum"), ones.sum()

    @torch.no_grad()
    def answer(self, texts: list[list[str]]) -> list[str]:
        was_training = self.training
        self.eval()
        try:
            return [self.labels[i] for i in self(*self.encode_texts(texts)).argmax(dim=-1).tolist()]
        finally:
            self.train(was_training)

    def validation_counts(self, batch: TextBatch) -> Tensor:
        tokens, lengths, classes, ones = batch
        logits = self(tokens, lengths).float()
        loss = F.cross_entropy(logits, classes, reduction="sum")
        return torch.stack([loss, (logits.argmax(dim=-1) == classes).sum().to(loss.dtype), ones.sum().to(loss.dtype)])

    def validation_figures(self, counts: np.ndarray) -> dict[str, float]:
        loss, correct, number = counts / max(counts[2], 1)
        return {"loss": loss, "accuracy": correct * (number > 0)}
