"""Translation language modelling on pairs (SLAM, section 3.2, after XLM): mask both sides of speech and its text,
predict both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_slam.objectives.base import Objective, ObjectiveOutput
from nemo_slam.objectives.inputs import MultimodalInput, SpeechInput, SpeechMasking, TextInput, TokenMasking
from nemo_slam.objectives.masked_speech import SpeechLoss
from nemo_slam.objectives.masked_text import TextLoss

if TYPE_CHECKING:
    from nemo_slam.models.step import StepOutputs


class TranslationLM(Objective):
    """[CLS] speech text, 75% of the frames and 50% of the tokens masked."""

    name = "translation_lm"
    streams = ("pairs",)

    def __init__(
        self,
        speech_masking: SpeechMasking,
        token_masking: TokenMasking,
        weight: float,
        contrastive_weight: float,
        speech_loss: SpeechLoss,
        text_loss: TextLoss,
    ):
        super().__init__()
        self.weight = weight
        self.contrastive_weight = contrastive_weight
        self._refer("speech_loss", speech_loss)
        self._refer("text_loss", text_loss)
        self.speech = (SpeechInput(self.name, "pairs", speech_masking),)
        self.text = (TextInput(self.name, "pairs", token_masking),)
        self.multimodal = (MultimodalInput(self.name, cls=True, speech=self.name, text=self.name),)

    def forward(self, outputs: StepOutputs) -> ObjectiveOutput:
        masked = outputs.masked_speech[self.name]
        result = self.speech_loss(outputs, masked, self.name, self.name, self.weight, self.contrastive_weight)
        result.extend(self.text_loss(outputs, self.name, self.name, self.weight))
        return result
