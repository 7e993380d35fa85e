"""Masked speech modelling (w2v-BERT, section 3; SLAM, section 3.2): a contrastive loss on the speech encoder, masked
codes on the multimodal encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nemo_slam.modules.quantizer import GumbelQuantizer, Quantized, perplexity
from nemo_slam.modules.random_projection import RandomProjectionQuantizer
from nemo_slam.objectives.base import (
    Histogram,
    Loss,
    Metric,
    Objective,
    ObjectiveOutput,
    count,
    sum_over_ranks,
    world_size,
)
from nemo_slam.objectives.inputs import MultimodalInput, SpeechInput, SpeechMasking
from slam_kernels import gumbel_noise, masked_cross_entropy, sample_distractors, span_contrastive

if TYPE_CHECKING:
    from nemo_slam.models.masking import MaskedRows
    from nemo_slam.models.step import StepOutputs


@dataclass(frozen=True)
class SpeechLossConfig:
    """Attributes:
    num_distractors: wrong targets for each masked frame, from the same utterance's masked frames.
    temperature: of the cosine similarities.
    ignore_equal_codes: drop distractors whose code equals the true one, as wav2vec 2.0's public code does.
    contrastive_weight, prediction_weight, diversity_weight: of the three terms.
    """

    num_distractors: int = 100
    temperature: float = 0.1
    ignore_equal_codes: bool = True
    contrastive_weight: float = 1.0
    prediction_weight: float = 1.0
    diversity_weight: float = 0.1


class SpeechLoss(nn.Module):
    """The losses on masked frames of any input; masked speech and translation language modelling share one.

    With the Gumbel quantizer these are contrastive, codes and diversity; with the frozen random projection, which has
    no vectors to train or to contrast, the codes alone.
    """

    def __init__(self, config: SpeechLossConfig, quantizer: GumbelQuantizer | RandomProjectionQuantizer, d_model: int):
        super().__init__()
        self.config = config
        self.quantizer = quantizer
        if isinstance(quantizer, GumbelQuantizer):
            self.context_projection = nn.Linear(d_model, quantizer.config.code_dim)
        self.code_head = nn.Linear(d_model, quantizer.config.num_codes)

    def forward(
        self,
        outputs: StepOutputs,
        masked: MaskedRows,
        multimodal: str,
        prefix: str,
        weight: float,
        contrastive_weight: float = 1.0,
    ) -> ObjectiveOutput:
        """The losses times ``weight``; the contrastive one times ``contrastive_weight`` too."""
        if isinstance(self.quantizer, RandomProjectionQuantizer):
            codes = self.quantizer(outputs.stacked_mel(masked.index))
            return self._codes(outputs, masked, codes, multimodal, prefix, weight)
        quantized = self.targets(outputs, masked, prefix)
        result = self._contrastive(outputs, masked, quantized, prefix, weight * contrastive_weight)
        result.extend(self._codes(outputs, masked, quantized.code_ids, multimodal, prefix, weight))
        result.losses.append(self._diversity(quantized, f"{prefix}/diversity", weight * self.config.diversity_weight))
        return result

    def targets(self, outputs: StepOutputs, masked: MaskedRows, prefix: str) -> Quantized:
        """The trained quantizer's choice for each masked frame, from the unmasked features."""
        assert isinstance(self.quantizer, GumbelQuantizer)
        features = outputs.features.index_select(0, masked.index)
        noise = gumbel_noise(
            *masked.where,
            key=outputs.randomness.key(f"gumbel/{prefix}"),
            num=self.quantizer.config.num_codes,
            dtype=torch.float64 if features.dtype == torch.float64 else torch.float32,
            backend=outputs.settings.kernels,
        )
        return self.quantizer(features, noise, outputs.optimizer_step)

    def distractors(
        self, outputs: StepOutputs, masked: MaskedRows, quantized: Quantized, prefix: str
    ) -> tuple[Tensor, Tensor]:
        """The masked rows (M, K) that each is told from, -1 for none, and how many rows have other rows at all."""
        drawn = sample_distractors(
            *masked.where,
            key=outputs.randomness.key(f"distractors/{prefix}"),
            num=self.config.num_distractors,
            backend=outputs.settings.kernels,
        )
        rows = (drawn[:, 0] >= 0).sum()
        if self.config.ignore_equal_codes:
            drawn = drawn.masked_fill(quantized.sampled[drawn.clamp(min=0)] == quantized.sampled[:, None], -1)
        return drawn, rows

    def _contrastive(
        self, outputs: StepOutputs, masked: MaskedRows, quantized: Quantized, prefix: str, weight: float
    ) -> ObjectiveOutput:
        """The true vector among distractors, from the speech encoder's output."""
        config = self.config
        distractors, rows = self.distractors(outputs, masked, quantized, prefix)
        contexts = self.context_projection(outputs.contexts.index_select(0, masked.index))
        loss, correct = span_contrastive(
            contexts,
            quantized.vectors,
            distractors,
            temperature=config.temperature,
            backend=outputs.settings.kernels,
        )
        # Accuracy is over the rows that still have a distractor: under collapse few are left, and it must not look
        # like failure.
        contested = count((distractors >= 0).any(dim=1).sum(), loss)
        utterances, skipped = masked.sequences_below(2)
        return ObjectiveOutput(
            [Loss(f"{prefix}/contrastive", loss, count(rows, loss), weight * config.contrastive_weight)],
            [
                Metric(f"{prefix}/contrastive_accuracy", correct.sum(), contested),
                Metric(f"{prefix}/contrastive_skipped", count(skipped, loss), count(utterances, loss)),
            ],
        )

    def _codes(
        self, outputs: StepOutputs, masked: MaskedRows, codes: Tensor, multimodal: str, prefix: str, weight: float
    ) -> ObjectiveOutput:
        """Cross entropy over the codes (M,), from the multimodal encoder's output."""
        loss, correct = masked_cross_entropy(
            outputs.hidden,
            outputs.to_multimodal(multimodal, "speech", masked.index),
            codes,
            self.code_head.weight,
            self.code_head.bias,
            backend=outputs.settings.kernels,
        )
        total = count(masked.index.numel(), loss)
        frames = count(int(outputs.packed_speech.lengths[prefix].sum()), loss)
        # Not torch.bincount, which reads the largest code back from a GPU.
        usage = codes.new_zeros(self.code_head.out_features).scatter_add(0, codes, torch.ones_like(codes))
        return ObjectiveOutput(
            [Loss(f"{prefix}/codes", loss, total, weight * self.config.prediction_weight)],
            [
                Metric(f"{prefix}/code_accuracy", correct.sum(), total),
                Metric(f"{prefix}/mask_rate", total, frames),
            ],
            [Histogram(f"{prefix}/code", usage, loss=f"{prefix}/codes")],
        )

    def _diversity(self, quantized: Quantized, name: str, weight: float) -> Loss:
        """(K - perplexity of the average code distribution) / K, the average taken over all ranks (wav2vec 2.0,
        section 3.2).

        It is a mean over ranks already, so each rank gives its share of the value and its own part of the gradient.
        """
        ranks = world_size()
        local = quantized.probabilities.sum(dim=0)
        reduced = sum_over_ranks(torch.cat([local.detach(), count(len(quantized.code_ids), local)[None]]))
        usage = (local + (reduced[:-1] - local.detach())) / reduced[-1].clamp(min=1)
        present = (reduced[-1] > 0).to(local.dtype)
        diversity = present * (1 - perplexity(usage) / usage.numel())
        return Loss(name, diversity - diversity.detach() * (1 - 1 / ranks), present / ranks, weight)


class MaskedSpeech(Objective):
    """Span-masked utterances of the speech stream; the losses are :class:`SpeechLoss`'s."""

    name = "masked_speech"
    streams = ("speech",)

    def __init__(self, masking: SpeechMasking, weight: float, loss: SpeechLoss):
        super().__init__()
        self.weight = weight
        self._refer("loss", loss)
        self.speech = (SpeechInput(self.name, "speech", masking),)
        self.multimodal = (MultimodalInput(self.name, speech=self.name),)

    def forward(self, outputs: StepOutputs) -> ObjectiveOutput:
        return self.loss(outputs, outputs.masked_speech[self.name], self.name, self.name, self.weight)
