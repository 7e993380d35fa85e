"""The losses as the papers write them: one masked position after another, in float64, sums in plain loops.

Nothing here knows packed layouts' index arithmetic, kernels or code of the objectives; what it is given are the
encoders' outputs, the masks, the Gumbel noise and the distractors of a step, and the parameters.
"""

from __future__ import annotations

import math

import torch


def places(outputs, batch, name: str) -> list[tuple[int, int, int]]:
    """(row in the speech layout, row among the multimodal rows, utterance) of every masked frame of an input.

    Sequences lie kind after kind in the order of the inputs, within a kind by length; in a pair CLS comes first.
    """
    return _places(outputs.packed_speech, outputs, batch, name, "speech")


def token_places(outputs, batch, name: str) -> list[tuple[int, int, int]]:
    """(row in the text layout, row among the multimodal rows, text) of every masked token of an input."""
    return _places(outputs.packed_text, outputs, batch, name, "text")


def _lengths(batch, name: str, segment: str) -> list[int]:
    part = batch.pairs if name.startswith(("translation_lm", "matching", "ctc")) else getattr(batch, segment)
    if segment == "speech":
        return [-(-int(samples) // 160 // 4) for samples in part.audio_lengths]
    return (part.negative_lengths if name.endswith("negative") else part.lengths).tolist()


def _begins(kinds: list[tuple[str, list[int]]]) -> dict[tuple[str, int], int]:
    """First row of every sequence: {(kind, number in the batch): row}."""
    begins, row = {}, 0
    for name, totals in kinds:
        for i in sorted(range(len(totals)), key=lambda i: totals[i]):
            begins[name, i] = row
            row += totals[i]
    return begins


def multimodal_begins(outputs, batch) -> dict[tuple[str, int], int]:
    kinds = []
    for name, request in outputs.multimodal.items():
        parts = [_lengths(batch, request.speech, "speech")] if request.speech else []
        parts += [_lengths(batch, request.text, "text")] if request.text else []
        kinds.append((name, [sum(lengths) + request.cls for lengths in zip(*parts, strict=True)]))
    return _begins(kinds)


def _places(packed, outputs, batch, name, segment):
    kinds = [(kind, _lengths(batch, kind, segment)) for kind in packed.kinds]
    own, shared = _begins(kinds), multimodal_begins(outputs, batch)
    masked = set((outputs.masked_speech if segment == "speech" else outputs.masked_text)[name].index.tolist())
    request = outputs.multimodal[name]
    found = []
    for i, length in enumerate(_lengths(batch, name, segment)):
        offset = int(request.cls)
        if segment == "text" and request.speech:
            offset += _lengths(batch, request.speech, "speech")[i]
        rows = [(own[name, i] + t, shared[name, i] + offset + t, i) for t in range(length)]
        found += [place for place in rows if place[0] in masked]
    assert len(found) == len(masked)
    return sorted(found)


def cross_entropy(logits: torch.Tensor, target: int) -> torch.Tensor:
    """-log p(target), p = exp(logit) / sum of exp(logit)."""
    return -(logits[target] - torch.log(sum(torch.exp(logit - logits.max()) for logit in logits)) - logits.max())


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def quantizer_logits(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Linear after a LayerNorm without parameters (eps 1e-5), row by row."""
    logits = []
    for row in rows:
        centred = row - row.mean()
        logits.append(weight @ (centred / torch.sqrt(centred.square().mean() + 1e-5)) + bias)
    return torch.stack(logits)


def contrastive(contexts, targets, codes, distractors, utterances, temperature) -> tuple[torch.Tensor, int]:
    """wav2vec 2.0, equation 3: -log exp(sim(c, q) / t) / sum over the positive and the distractors.

    Distractors of the same code are left out. An utterance's only masked frame has no distractor: it does not count.
    """
    total, counted = contexts.new_zeros(()), 0
    for i in range(len(contexts)):
        if sum(u == utterances[i] for u in utterances) < 2:
            assert (distractors[i] == -1).all()
            continue
        counted += 1
        assert all(j != i and utterances[j] == utterances[i] for j in distractors[i].tolist())
        others = [j for j in distractors[i].tolist() if codes[j] != codes[i]]
        scores = torch.stack([cosine(contexts[i], targets[j]) / temperature for j in [i, *others]])
        total = total + cross_entropy(scores, 0)
    return total, counted


def diversity(probabilities: torch.Tensor) -> torch.Tensor:
    """wav2vec 2.0's code: (K - exp(entropy of the average distribution)) / K."""
    average = sum(probabilities) / len(probabilities)
    entropy = -sum(p * torch.log(p) for p in average)
    return (len(average) - torch.exp(entropy)) / len(average)


def straight_through(scores: torch.Tensor, temperature: float, codebook: torch.Tensor, gradient: torch.Tensor):
    """Gradients of a hard Gumbel softmax from those of its vectors: of the scores and of the codebook.

    Forward, a vector is its code's entry; backward, it is sum_k softmax(scores / t)_k entry_k, whose derivative by
    score j is p_j (entry_j - sum_k p_k entry_k) / t. The codebook's derivative is that of the forward value.
    """
    by_score, by_entry = torch.zeros_like(scores), torch.zeros_like(codebook)
    for i, row in enumerate(scores):
        weights = [math.exp((s - row.max()).item() / temperature) for s in row]
        share = [w / sum(weights) for w in weights]
        mean = sum(p * entry for p, entry in zip(share, codebook, strict=True))
        for j in range(len(row)):
            by_score[i, j] = share[j] * (gradient[i] @ (codebook[j] - mean)) / temperature
        by_entry[int(row.argmax())] += gradient[i]
    return by_score, by_entry


def matching(score: torch.Tensor, label: int) -> torch.Tensor:
    """Binary cross entropy of sigmoid(score)."""
    probability = 1 / (1 + torch.exp(-score))
    return -torch.log(probability if label else 1 - probability)
