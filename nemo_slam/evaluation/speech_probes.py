"""Does the speech encoder's output say what is masked at a place, or only what is said in the language as a whole?

Codes repeat, so a contrastive accuracy cannot be held against 1 / (distractors + 1): a model that reads no context
prefers common codes and is right more often than that. So the same question is asked with the context of another
utterance, which knows as much about speech in general and nothing about this place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_slam.modules.quantizer import GumbelQuantizer
from nemo_slam.objectives.base import Metric, count
from nemo_slam.objectives.masked_speech import MaskedSpeech
from slam_kernels import span_contrastive

if TYPE_CHECKING:
    from nemo_slam.models.masking import MaskedRows
    from nemo_slam.models.pretraining import SLAMPretrainingModel
    from nemo_slam.models.step import StepOutputs


def contrastive(model: SLAMPretrainingModel, outputs: StepOutputs) -> list[Metric]:
    """Contrastive accuracy on the speech stream, and with each masked frame's context taken from the next utterance.

    Both are over the same frames: those with a distractor of another code, in a batch with another utterance to borrow
    from.
    """
    loss, name = model.speech_loss, MaskedSpeech.name
    if name not in model.objectives or loss is None or not isinstance(loss.quantizer, GumbelQuantizer):
        return []
    masked = outputs.masked_speech[name]
    quantized = loss.targets(outputs, masked, name)
    distractors, _ = loss.distractors(outputs, masked, quantized, name)
    contexts = loss.context_projection(outputs.contexts.index_select(0, masked.index))
    other, borrowed = next_utterance(masked)
    counted = borrowed & (distractors >= 0).any(dim=1)

    def accuracy(rows: Tensor, title: str) -> Metric:
        _, correct = span_contrastive(
            rows,
            quantized.vectors,
            distractors,
            temperature=loss.config.temperature,
            backend=outputs.settings.kernels,
        )
        return Metric(f"probe/{title}", (correct & counted).sum(), count(counted.sum(), rows))

    return [
        accuracy(contexts, "contrastive_accuracy"),
        accuracy(contexts.index_select(0, other), "contrastive_accuracy_other_context"),
    ]


def next_utterance(masked: MaskedRows) -> tuple[Tensor, Tensor]:
    """For each of the M masked rows one of the next utterance that has any, going round; the r-th for the r-th.

    *Shape:* positions among the masked rows (M,) int64, and where that is another utterance, (M,) bool.
    """
    bounds = torch.searchsorted(masked.index, masked.cu_seqlens.to(torch.int64))
    sizes = bounds.diff()
    present = sizes.nonzero().squeeze(1)
    sizes, firsts = sizes.index_select(0, present), bounds.index_select(0, present)
    rank = torch.arange(len(masked.index), device=masked.index.device) - firsts.repeat_interleave(sizes)
    following = torch.roll(firsts, -1).repeat_interleave(sizes)
    other = following + rank % torch.roll(sizes, -1).repeat_interleave(sizes)
    return other, torch.full_like(other, len(present) > 1, dtype=torch.bool)
