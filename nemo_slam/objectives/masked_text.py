"""Span masking on text (SLAM, section 3.2): 15% of the tokens in spans of 5, predicted from the multimodal encoder's
output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nemo_slam.objectives.base import Loss, Metric, Objective, ObjectiveOutput, count
from nemo_slam.objectives.inputs import MultimodalInput, TextInput, TokenMasking
from slam_kernels import masked_cross_entropy

if TYPE_CHECKING:
    from nemo_slam.models.step import StepOutputs


class TextLoss(nn.Module):
    """Cross entropy of masked tokens; the output projection is the embedding (tied), plus a bias.

    Beside its own accuracy and cross entropy stand those of a guess by the unigrams of the training text, once
    :meth:`set_unigram` has been given them: what a model gets that reads no context.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def set_unigram(self, name: str, counts: Tensor) -> None:
        """Token counts (V,) of the training text of input ``name``; one is added to each, for tokens not seen there."""
        smooth = counts.double() + 1
        self.register_buffer(f"unigram_{name}", (smooth / smooth.sum()).log().float(), persistent=False)

    def forward(self, outputs: StepOutputs, multimodal: str, prefix: str, weight: float) -> ObjectiveOutput:
        index = outputs.masked_text[prefix].index
        truth = outputs.tokens.index_select(0, index)
        loss, correct = masked_cross_entropy(
            outputs.hidden,
            outputs.to_multimodal(multimodal, "text", index),
            truth,
            outputs.text_encoder.output_weight,
            self.bias,
            backend=outputs.settings.kernels,
        )
        total = count(index.numel(), loss)
        tokens = count(int(outputs.packed_text.lengths[prefix].sum()), loss)
        metrics = [
            Metric(f"{prefix}/token_accuracy", correct.sum(), total),
            Metric(f"{prefix}/token_mask_rate", total, tokens),
        ]
        unigram = getattr(self, f"unigram_{prefix}", None)
        if unigram is not None:
            metrics += [
                Metric(f"{prefix}/token_accuracy_by_unigram", (truth == unigram.argmax()).sum(), total),
                Metric(f"{prefix}/tokens_by_unigram", -unigram.index_select(0, truth).double().sum(), total),
            ]
        return ObjectiveOutput([Loss(f"{prefix}/tokens", loss, total, weight)], metrics)


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
