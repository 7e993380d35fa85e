"""Hard negatives for matching, by similarity within the batch (ALBEF, section 3.2).

The two encoders share no space before the multimodal one, so ALBEF trains a contrastive head beside them and draws
negatives by its similarities. Ours is small and does nothing else: pooled speech and pooled token embeddings go,
*detached*, through one projection each. The encoders get no gradient from it: what they learn is the objective's own.

The batch is the micro-batch of all ranks: they exchange pooled rows and texts, so that neither the draw nor the loss
depends on which rank holds which pair, and a rank with a single pair has negatives too.

Shape legend: B this rank's pairs, C those of all ranks, N the tokens of the C texts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_slam.data.batch import PairBatch
from nemo_slam.objectives.base import Loss, Metric, ObjectiveOutput, count, gather_over_ranks
from nemo_slam.packing import to_device
from slam_kernels import gumbel_noise

TEMPERATURE = 0.07
"""Of the cosine similarities: where ALBEF's trained temperature begins."""


@dataclass
class ChosenTexts:
    """Which pair's text stands in the place of each pair's negative.

    *Shape:*
        - index: (B,) int64 on the CPU, of the C texts; -1 where the stream's negative stays
        - first: this rank's pairs are ``first`` to ``first + B`` of the C
        - tokens, lengths: (N,) the C texts end to end; (C,) on the CPU
        - by_utterance, by_text: (B, C) similarities of this rank's utterances with all texts, and of its texts with all
          utterances, over the temperature, with gradients for the projections alone
        - rivals: (B, C) bool, True where text j differs from pair i's own
    """

    index: np.ndarray
    first: int
    tokens: Tensor
    lengths: np.ndarray
    by_utterance: Tensor
    by_text: Tensor
    rivals: Tensor


def mean_rows(rows: Tensor, lengths: np.ndarray) -> Tensor:
    """The mean of each sequence of rows laid end to end. *Shape:* (sum of lengths, D), (B,) -> (B, D)."""
    sizes = to_device(lengths, rows.device)
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
        """*Shape:* pooled speech and text (C, D) -> cosines over the temperature (C, C), utterance by text."""
        sides = []
        for projection, pooled in ((self.speech, speech), (self.text, text)):
            rows = projection(F.layer_norm(pooled, pooled.shape[1:]).to(projection.weight.dtype))
            sides.append(F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1))
        return sides[0] @ sides[1].t() / TEMPERATURE

    def forward(self, speech: Tensor, text: Tensor, pairs: PairBatch, *, key: int, backend: str) -> ChosenTexts:
        """Choose with probability softmax(similarity) among the other texts of the batch.

        Every rank must call it. Reading the choice waits for the device once a step: lengths are planned on the CPU.

        Args:
            speech, text: pooled (B, D), without a gradient.
            pairs: their texts, of which none that counts as equal is a negative; ids and epochs decide the draw, with
                ``key``.
        """
        device, size = speech.device, len(pairs)
        rows = torch.stack([pairs.epochs, pairs.ids, pairs.text_classes, pairs.lengths], dim=1)
        everyone, first = gather_over_ranks(rows, device)
        pooled, _ = gather_over_ranks(torch.stack([speech, text], dim=1), device)
        tokens, _ = gather_over_ranks(pairs.tokens, device)
        epochs, ids, classes, lengths = everyone.numpy().T
        with torch.autocast(device.type, enabled=False):
            similarities = self.similarities(*pooled.unbind(dim=1))
        own = slice(first, first + size)
        differs = classes[own, None] != classes
        rivals = to_device(differs, device)
        index = np.full(size, -1, np.int64)
        if differs.any():
            # Columns of noise belong to texts in an order that is the same whoever holds them.
            column = to_device(np.argsort(np.lexsort((ids, epochs))), device)
            sequences = torch.arange(size + 1, device=device)
            noise = gumbel_noise(
                sequences[:-1],
                sequences.to(torch.int32),
                pairs.ids.to(device),
                pairs.epochs.to(device),
                key=key,
                num=len(classes),
                dtype=similarities.dtype,
                backend=backend,
            ).index_select(1, column)
            drawn = (similarities[own].detach() + noise).masked_fill(~rivals, float("-inf")).argmax(dim=1)
            index = np.where(differs.any(axis=1), drawn.cpu().numpy(), -1)
        return ChosenTexts(index, first, tokens, lengths, similarities[own], similarities.t()[own], rivals)

    def losses(self, chosen: ChosenTexts, prefix: str, weight: float) -> ObjectiveOutput:
        """The true text among those of the batch and the true utterance among its utterances, half each (ALBEF,
        equation 1, without momentum); pairs without another text do not count."""
        size, device = len(chosen.index), chosen.rivals.device
        place = torch.arange(chosen.first, chosen.first + size, device=device)
        compared = chosen.rivals | (place[:, None] == torch.arange(len(chosen.lengths), device=device))
        by_utterance, by_text = (
            similarities.masked_fill(~compared, float("-inf")) for similarities in (chosen.by_utterance, chosen.by_text)
        )
        shares = [logits.log_softmax(dim=1).gather(1, place[:, None]) for logits in (by_utterance, by_text)]
        loss = -(shares[0] + shares[1]).sum() / 2  # compared with itself alone, a pair's is 0
        counted = chosen.rivals.any(dim=1)
        correct = (by_utterance.argmax(dim=1) == place) & counted if size else counted
        total, pairs = count(counted.sum(), loss), count(size, loss)
        return ObjectiveOutput(
            [Loss(f"{prefix}/contrast", loss, total, weight)],
            [
                Metric(f"{prefix}/contrast_accuracy", correct.sum(), total),
                Metric(f"{prefix}/in_batch", count(int((chosen.index >= 0).sum()), loss), pairs),
            ],
        )
