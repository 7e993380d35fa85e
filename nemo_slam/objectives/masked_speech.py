"""Masked speech modelling (w2v-BERT, section 3; SLAM, section 3.2): a contrastive loss on the speech encoder, masked codes on
the multimodal encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from slam_kernels import gumbel_noise, masked_cross_entropy, sample_distractors, span_contrastive
from torch import nn

from nemo_slam.modules.quantizer import GumbelQuantizer, Quantized, perplexity
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

if TYPE_CHECKING:
    from nemo_slam.models.step import MaskedRows, StepOutputs


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
    """The three terms on masked frames of any input; masked speech and translation language modelling share one."""

    def __init__(self, config: SpeechLossConfig, quantizer: GumbelQuantizer, d_model: int):
        super().__init__()
        self.config = config
        self.quantizer = quantizer
        self.context_projection = nn.Linear(d_model, quantizer.config.code_dim)
        self.code_head = nn.Linear(d_model, quantizer.config.num_codes)

    def forward(
        self, outputs: StepOutputs, masked: MaskedRows, multimodal: str, prefix: str, weight: float
    ) -> ObjectiveOutput:
        config, index = self.config, masked.index
        key, backend = outputs.randomness.key, outputs.settings.kernels
        where = (index, masked.cu_seqlens, masked.ids, masked.epochs)
        features = outputs.features.index_select(0, index)
        num_codes = self.quantizer.config.num_codes
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        noise = gumbel_noise(*where, key=key(f"gumbel/{prefix}"), num=num_codes, dtype=dtype, backend=backend)
        quantized = self.quantizer(features, noise, outputs.optimizer_step)

        distractors = sample_distractors(
            *where, key=key(f"distractors/{prefix}"), num=config.num_distractors, backend=backend
        )
        contrastive_rows = (distractors[:, 0] >= 0).sum()
        if config.ignore_equal_codes:
            equal = quantized.sampled[distractors.clamp(min=0)] == quantized.sampled[:, None]
            distractors = distractors.masked_fill(equal, -1)
        contexts = self.context_projection(outputs.contexts.index_select(0, index))
        contrastive, contrast_correct = span_contrastive(
            contexts, quantized.vectors, distractors, temperature=config.temperature, backend=backend
        )
        prediction, code_correct = masked_cross_entropy(
            outputs.hidden,
            outputs.to_multimodal(multimodal, "speech", index),
            quantized.code_ids,
            self.code_head.weight,
            self.code_head.bias,
            backend=backend,
        )
        total = count(index.numel(), prediction)
        contrastive_count = count(contrastive_rows, prediction)
        losses = [
            Loss(f"{prefix}/contrastive", contrastive, contrastive_count, weight * config.contrastive_weight),
            Loss(f"{prefix}/codes", prediction, total, weight * config.prediction_weight),
            self._diversity(quantized, f"{prefix}/diversity", weight * config.diversity_weight),
        ]
        metrics = [
            Metric(f"{prefix}/contrastive_accuracy", contrast_correct.sum(), contrastive_count),
            Metric(f"{prefix}/code_accuracy", code_correct.sum(), total),
            Metric(f"{prefix}/mask_rate", total, count(int(outputs.packed_speech.lengths[prefix].sum()), total)),
        ]
        usage = torch.bincount(quantized.code_ids, minlength=num_codes)
        return ObjectiveOutput(losses, metrics, [Histogram(f"{prefix}/code", usage, loss=f"{prefix}/codes")])

    def _diversity(self, quantized: Quantized, name: str, weight: float) -> Loss:
        """(K - perplexity of the average code distribution) / K, the average taken over all ranks (wav2vec 2.0, section 3.2).

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
        self.loss = loss
        self.speech = (SpeechInput(self.name, "speech", masking),)
        self.multimodal = (MultimodalInput(self.name, speech=self.name),)

    def forward(self, outputs: StepOutputs) -> ObjectiveOutput:
        return self.loss(outputs, outputs.masked_speech[self.name], self.name, self.name, self.weight)
