"""What fine-tuned models that read text have in common: the encoder, its tokenizer, sums over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from omegaconf import DictConfig
from torch import Tensor

from nemo_slam.data.token_file import Tokenizer
from nemo_slam.finetuning.sentences import Sentences
from nemo_slam.finetuning.text_encoder import SLAMTextEncoder
from nemo_slam.objectives.base import sum_over_ranks, world_size

TextBatch = tuple[Tensor, Tensor, Tensor, Tensor]


def pad(rows: list[np.ndarray], value: int) -> tuple[Tensor, Tensor]:
    """*Shape:* B vectors -> (B, U) int64 padded with ``value``, and their lengths (B,)."""
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    lengths = torch.tensor([len(row) for row in tensors], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value), lengths


class TextModel(ModelPT):
    """A ``ModelPT`` around :class:`SLAMTextEncoder`.

    Args:
        cfg: the ``model`` node: ``encoder``, ``source_tokenizer.model_path`` and what the subclass reads.
        trainer: Lightning's trainer.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None):
        super().__init__(cfg=cfg, trainer=trainer)
        path = self.register_artifact("source_tokenizer.model_path", cfg.source_tokenizer.model_path)
        self.source_tokenizer = Tokenizer(path)
        self.encoder: SLAMTextEncoder = self.from_config_dict(self.cfg.encoder)
        if self.source_tokenizer.vocab_size > self.encoder.text_encoder.vocab_size:
            raise ValueError(
                f"model.source_tokenizer: {path} has {self.source_tokenizer.vocab_size} pieces, the embedding "
                f"{self.encoder.text_encoder.vocab_size}: give the tokenizer that the encoder was trained with"
            )
        self.last_validation: dict[str, float] = {}
        self._validation: list[Tensor] = []

    @classmethod
    def list_available_models(cls) -> list[Any]:
        return []

    def setup_training_data(self, train_data_config: DictConfig | dict | None) -> None:
        """The loaders are ``nemo_slam.finetuning.loader``'s."""

    def setup_validation_data(self, val_data_config: DictConfig | dict | None) -> None:
        """As :meth:`setup_training_data`."""

    def encode_texts(self, texts: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Rows of k texts -> tokens (B, U), end to end, and lengths (B, k), on the model's device.

        Raises:
            RowError: a text that the tokenizer does not know, or an empty one.
        """
        rows, lengths = [], []
        for row in texts:
            parts = self.source_tokenizer.encode(row)
            for tokens in parts:
                self.source_tokenizer.check(tokens)
            rows.append(np.concatenate([np.asarray(tokens, np.int64) for tokens in parts]))
            lengths.append([len(tokens) for tokens in parts])
        return pad(rows, 0)[0].to(self.device), torch.tensor(lengths).to(self.device)

    def answer(self, texts: list[list[str]]) -> list[str]:
        """What the model says of rows of k texts, in order: translations, or labels.

        Raises:
            RowError: a text that is empty, or unknown to the tokenizer.
        """
        raise NotImplementedError

    def collate(self, sentences: Sentences) -> TextBatch:
        """Source tokens (B, U), their lengths (B, k), and the target in the subclass's form."""
        raise NotImplementedError

    def losses(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """The sum of the loss and the number of items that it sums over."""
        raise NotImplementedError

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Tensor]:
        total, number = self.losses(batch)
        # Gradients averaged over ranks are then those of the global batch's mean.
        return {"loss": total * world_size() / sum_over_ranks(number).clamp(min=1)}

    def validation_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._validation.append(self.validation_counts(batch).detach().double().cpu())

    def validation_counts(self, batch: TextBatch) -> Tensor:
        """A vector that is summed over batches and ranks; :meth:`validation_figures` reads the sum."""
        raise NotImplementedError

    def validation_figures(self, counts: np.ndarray) -> dict[str, float]:
        """Figures by name, without the prefix ``val_``."""
        raise NotImplementedError

    def on_validation_epoch_end(self) -> None:
        if not self._validation:
            return
        # float64 holds every whole number that there can be; float32 would round counts above 16.8 million.
        counts = sum_over_ranks(torch.stack(self._validation).sum(0).to(self.device))
        self._validation = []
        for name, value in self.validation_figures(counts.cpu().numpy()).items():
            self.log(f"val_{name}", value, sync_dist=False)
