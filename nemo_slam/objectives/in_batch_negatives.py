"""Hard negatives for matching, by similarity within the batch (ALBEF, section 3.2).

The two encoders share no space before the multimodal one, so ALBEF trains a contrastive head beside them and draws
negatives by its similarities. Ours is small and does nothing else: pooled speech and pooled token embeddings go,
*detached*, through one projection each. The encoders get no gradient from it: what they learn is the objective's own.

Shape legend: B pairs of the micro-batch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_slam.objectives.base import Loss, Metric, ObjectiveOutput, count
from slam_kernels import gumbel_noise

TEMPERATURE = 0.07
"""Of the cosine similarities: where ALBEF's trained temperature begins."""


@dataclass
class ChosenTexts:
    """Which pair's text stands in the place of each pair's negative.

    *Shape:* ``index`` (B,) int64 on the CPU, -1 where the stream's negative stays; ``similarities`` (B, B) of
    utterances with texts, over the temperature, with gradients for the projections alone; ``rivals`` (B, B) bool, True
    where text j differs from text i.
    """

    index: np.ndarray
    similarities: Tensor
    rivals: Tensor


def mean_rows(rows: Tensor, lengths: np.ndarray) -> Tensor:
    """The mean of each sequence of rows laid end to end. *Shape:* (sum of lengths, D), (B,) -> (B, D)."""
    sizes = torch.as_tensor(lengths).to(rows.device)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    sums = torch.segment_reduce(rows, "sum", lengths=sizes, axis=0, unsafe=True, initial=0)
    return sums / sizes.clamp(min=1)[:, None]


class InBatchNegatives(nn.Module):
    """Draws for each utterance the text of another pair, likelier the more similar it is; trains the similarity."""

    def __init__(self, d_model: int):
        super().__init__()
        self.speech = nn.Linear(d_model, d_model)
        self.text = nn.Linear(d_model, d_model)

    def similarities(self, speech: Tensor, text: Tensor) -> Tensor:
        """*Shape:* pooled speech and text (B, D) -> cosines over the temperature (B, B), utterance by text."""
        sides = []
        for projection, pooled in ((self.speech, speech), (self.text, text)):
            rows = projection(F.layer_norm(pooled, pooled.shape[1:]).to(projection.weight.dtype))
            sides.append(F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1))
        return sides[0] @ sides[1].t() / TEMPERATURE

    def forward(
        self,
        speech: Tensor,
        text: Tensor,
        classes: np.ndarray,
        ids: Tensor,
        epochs: Tensor,
        *,
        key: int,
        backend: str,
    ) -> ChosenTexts:
        """Choose with probability softmax(similarity) among the other texts of the batch.

        Reading the choice waits for the device once a step: lengths are planned on the CPU.

        Args:
            speech, text: pooled (B, D), without a gradient.
            classes: (B,) equal where two texts count as equal: such a text is never a negative.
            ids, epochs: (B,) of the pairs; with ``key`` they decide the draw.
        """
        with torch.autocast(speech.device.type, enabled=False):
            similarities = self.similarities(speech, text)
        differs = classes[:, None] != classes
        rivals = torch.as_tensor(differs).to(speech.device)
        index = np.full(len(classes), -1, np.int64)
        if differs.any():
            pairs = torch.arange(len(classes) + 1, device=speech.device)
            noise = gumbel_noise(
                pairs[:-1],
                pairs.to(torch.int32),
                ids.to(speech.device),
                epochs.to(speech.device),
                key=key,
                num=len(classes),
                dtype=similarities.dtype,
                backend=backend,
            )
            drawn = (similarities.detach() + noise).masked_fill(~rivals, float("-inf")).argmax(dim=1)
            index = np.where(differs.any(axis=1), drawn.cpu().numpy(), -1)
        return ChosenTexts(index, similarities, rivals)

    def losses(self, chosen: ChosenTexts, prefix: str, weight: float) -> ObjectiveOutput:
        """The true text among those of the batch and the true utterance among its utterances, half each (ALBEF,
        equation 1, without momentum); pairs without another text do not count."""
        own = torch.eye(len(chosen.index), dtype=torch.bool, device=chosen.rivals.device)
        logits = chosen.similarities.masked_fill(~(chosen.rivals | own), float("-inf"))
        counted = chosen.rivals.any(dim=1)
        both = (logits.log_softmax(dim=1) + logits.log_softmax(dim=0)).diagonal() / 2
        loss = chosen.similarities.sum() * 0 - both[counted].sum()
        total = count(counted.sum(), loss)
        correct = (logits.argmax(dim=1) == torch.arange(len(own), device=own.device)) & counted if len(own) else counted
        pairs = count(len(own), loss)
        return ObjectiveOutput(
            [Loss(f"{prefix}/contrast", loss, total, weight)],
            [
                Metric(f"{prefix}/contrast_accuracy", correct.sum(), total),
                Metric(f"{prefix}/in_batch", count(int((chosen.index >= 0).sum()), loss), pairs),
            ],
        )
