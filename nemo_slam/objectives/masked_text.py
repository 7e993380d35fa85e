"""Span masking on text (SLAM, section 3.2): 15% of the tokens in spans of 5, predicted from the multimodal encoder's
output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from nemo_slam.objectives.base import Loss, Metric, Objective, ObjectiveOutput, count
from nemo_slam.objectives.inputs import MultimodalInput, TextInput, TokenMasking
from slam_kernels import masked_cross_entropy

if TYPE_CHECKING:
    from nemo_slam.models.step import StepOutputs


class TextLoss(nn.Module):
    """Cross entropy of masked tokens; the output projection is the embedding (tied), plus a bias."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, outputs: StepOutputs, multimodal: str, prefix: str, weight: float) -> ObjectiveOutput:
        index = outputs.masked_text[prefix].index
        loss, correct = masked_cross_entropy(
            outputs.hidden,
            outputs.to_multimodal(multimodal, "text", index),
            outputs.tokens.index_select(0, index),
            outputs.text_encoder.output_weight,
            self.bias,
            backend=outputs.settings.kernels,
        )
        total = count(index.numel(), loss)
        tokens = count(int(outputs.packed_text.lengths[prefix].sum()), loss)
        return ObjectiveOutput(
            [Loss(f"{prefix}/tokens", loss, total, weight)],
            [
                Metric(f"{prefix}/token_accuracy", correct.sum(), total),
                Metric(f"{prefix}/token_mask_rate", total, tokens),
            ],
        )


class MaskedText(Objective):
    """Span-masked texts of the text stream."""

    name = "masked_text"
    streams = ("text",)

    def __init__(self, masking: TokenMasking, weight: float, loss: TextLoss):
        super().__init__()
        self.weight = weight
        self._refer("loss", loss)
        self.text = (TextInput(self.name, "text", masking),)
        self.multimodal = (MultimodalInput(self.name, text=self.name),)

    def forward(self, outputs: StepOutputs) -> ObjectiveOutput:
        return self.loss(outputs, self.name, self.name, self.weight)
