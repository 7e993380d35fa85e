"""PyTorch twin of the contrastive loss over distractors by index."""

from __future__ import annotations

import torch

CHUNK = 128
"""Rows at a time: the twin holds (CHUNK, width of their sequences) similarities, never (M, K, D) vectors."""

EPS = 1e-8

TIE = 2.0**-18
"""Cosines as near as this are equal: of one vector, two ways of summing in float32 give cosines that differ less."""


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their length, at least 1e-8. *Shape:* ``(M, D)`` -> ``(M, D)``."""
    return rows * rows.square().sum(-1, keepdim=True).clamp(min=EPS * EPS).rsqrt()


def span_contrastive(
    contexts: torch.Tensor, targets: torch.Tensor, distractors: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `slam_kernels.span_contrastive`. Computes in float32, or in float64 for float64 input, autocast or not.

    A distractor drawn n times counts n times: the sum over distractors is a sum over all rows of a band weighted by
    these counts, two matrix products instead of a gather of vectors, and exact in any order of summation of the counts.
    """
    with torch.autocast(contexts.device.type, enabled=False):
        return _loss(contexts, targets, distractors, temperature)


def _loss(
    contexts: torch.Tensor, targets: torch.Tensor, distractors: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    compute = torch.float64 if contexts.dtype == torch.float64 else torch.float32
    rows = contexts.shape[0]
    if rows == 0:
        return contexts.to(compute).sum() + targets.to(compute).sum(), contexts.new_zeros(0, dtype=torch.bool)
    contexts, targets = unit_rows(contexts.to(compute)), unit_rows(targets.to(compute))
    positive = (contexts * targets).sum(-1) / temperature
    losses, correct = [], []
    for begin in range(0, rows, CHUNK):
        drawn = distractors[begin : begin + CHUNK]
        own = positive[begin : begin + CHUNK]
        present = drawn >= 0
        low, high = int(torch.where(present, drawn, rows).min()), int(drawn.max()) + 1
        if high == 0:
            losses.append(own.sum() * 0)
            correct.append(torch.zeros_like(own, dtype=torch.bool))
            continue
        counts = own.new_zeros(drawn.shape[0], high - low)
        counts.scatter_add_(1, (drawn - low).clamp(min=0), present.to(compute))
        similarity = contexts[begin : begin + CHUNK] @ targets[low:high].t() / temperature
        logits = torch.cat((own.unsqueeze(1), similarity + counts.log()), dim=1)
        some = present.any(1)
        losses.append(((logits.logsumexp(1) - own) * some).sum())
        rival = similarity.detach().masked_fill(counts == 0, float("-inf")).amax(1)
        correct.append((own > rival + TIE / temperature) & some)
    return torch.stack(losses).sum(), torch.cat(correct)
