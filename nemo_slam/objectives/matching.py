"""Speech-text matching (SLAM, section 3.2, after ALBEF): does this text belong to this speech?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from nemo_slam.objectives.base import Loss, Metric, Objective, ObjectiveOutput, count
from nemo_slam.objectives.in_batch_negatives import ChosenTexts, InBatchNegatives, mean_rows
from nemo_slam.objectives.inputs import MultimodalInput, SpeechInput, SpeechMasking, TextInput, TokenMasking
from nemo_slam.packing import to_device

if TYPE_CHECKING:
    from nemo_slam.models.step import EncodedSpeech, StepOutputs

INPUTS = ("unmasked", "masked")
NEGATIVES = ("stream", "in_batch")


class Matching(Objective):
    """A binary decision from the CLS row, one positive and one negative for each pair; both share one speech encoding.

    Args:
        speech_masking, token_masking: None for unmasked input.
        negatives: ``stream`` or ``in_batch``, see :class:`~nemo_slam.models.settings.MatchingConfig`.
    """

    name = "matching"
    negative = "matching_negative"
    streams = ("pairs",)

    def __init__(
        self,
        weight: float,
        d_model: int,
        speech_masking: SpeechMasking | None,
        token_masking: TokenMasking | None,
        negatives: str = "stream",
    ):
        super().__init__()
        self.weight = weight
        self.in_batch = InBatchNegatives(d_model) if negatives == "in_batch" else None
        self.head = nn.Linear(d_model, 1)
        self.speech = (SpeechInput(self.name, "pairs", speech_masking, draw=1),)
        self.text = (
            TextInput(self.name, "pairs", token_masking, draw=1),
            TextInput(self.negative, "pairs", token_masking, negative=True, draw=2),
        )
        self.multimodal = (
            MultimodalInput(self.name, cls=True, speech=self.name, text=self.name),
            MultimodalInput(self.negative, cls=True, speech=self.name, text=self.negative),
        )

    def choose_texts(self, encoded: EncodedSpeech) -> dict[str, ChosenTexts]:
        if self.in_batch is None:
            return {}
        pairs, device = encoded.batch.pairs, encoded.contexts.device
        assert pairs is not None
        rows = to_device(encoded.packed_speech.rows_of(self.name, 0), device)
        frames = encoded.packed_speech.lengths[self.name][:, 0]
        with torch.no_grad():
            speech = mean_rows(encoded.contexts.index_select(0, rows), frames)
            text = mean_rows(encoded.text_encoder.embedding(pairs.tokens), pairs.lengths.numpy())
        chosen = self.in_batch(
            speech,
            text,
            pairs,
            key=encoded.randomness.key("in_batch_negatives"),
            backend=encoded.settings.kernels,
        )
        return {self.negative: chosen}

    def scores(self, outputs: StepOutputs, name: str) -> torch.Tensor:
        """(S,) logits that the text belongs to the speech, for the sequences of an input in batch order."""
        rows = to_device(outputs.rows(name, "cls"), outputs.hidden.device)
        scores = self.head(outputs.hidden.index_select(0, rows)).squeeze(-1)
        return scores if scores.dtype == torch.float64 else scores.float()

    def forward(self, outputs: StepOutputs) -> ObjectiveOutput:
        true, false = self.scores(outputs, self.name), self.scores(outputs, self.negative)
        loss = F.softplus(-true).sum() + F.softplus(false).sum()
        total = count(true.numel() + false.numel(), loss)
        correct = (true > 0).sum() + (false < 0).sum()
        result = ObjectiveOutput(
            [Loss(self.name, loss, total, self.weight)], [Metric(f"{self.name}/accuracy", correct, total)]
        )
        if self.in_batch is not None:
            result.extend(self.in_batch.losses(outputs.chosen_texts[self.negative], self.name, self.weight))
        return result
