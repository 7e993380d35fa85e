"""Probes: does the pre-trained model use one modality to understand the other?

Run at validation on the pairs (``probes: true``); figures are of sums over all batches and ranks. Input is not
corrupted but for what is asked: speech is unmasked, masked tokens are all [MASK].

* ``probe/text_given_speech``, ``.._given_other_speech``, ``.._without_speech``: accuracy on masked tokens. The first
  above the other two is the cross-modal gain; ``probe/token_top_share`` is what guessing the commonest token gets.
  Other speech is that of the batch's next pair with another text.
* ``probe/matching_choice``: how often the true text scores above the pair's negative, beside ``.._by_length``, the same
  choice by the ratio of lengths alone.
* ``probe/retrieval_at_K``: is the true text among the K best of the batch's texts, beside ``.._chance``.
* ``probe/contrastive_accuracy`` on the speech stream, beside ``.._other_context``: see :mod:`.speech_probes`.
* ``probe/effective_rank`` of the multimodal encoder's output on speech alone: 1 is collapse, D the most there can be.

Other guesses to beat come with the objectives' own figures, in training and in validation:
``masked_speech/code_accuracy`` beside ``code_top_share`` (the commonest code among the same targets), with
``code_usage`` (share of the codes that occur at all), ``code_perplexity`` and ``code_information_gain``;
``masked_text/token_accuracy`` and ``tokens`` (cross entropy, nats) beside ``token_accuracy_by_unigram`` and
``tokens_by_unigram``, a guess by the unigrams of the training text.

Shape legend: B pairs, D width, M masked tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nemo_slam.data.batch import PairBatch, StepBatch
from nemo_slam.evaluation.speech_probes import contrastive
from nemo_slam.modules.speech_encoder import subsampled_lengths
from nemo_slam.objectives.base import Metric, ObjectiveOutput, Pooled, count
from nemo_slam.objectives.matching import Matching
from nemo_slam.objectives.translation_lm import TranslationLM
from nemo_slam.packing import PackedSequences, Segments, SequenceLayout, gather_rows, pack, ranges, row_multiple
from nemo_slam.training.parallel import of_every_rank
from slam_kernels import sample_spans

if TYPE_CHECKING:
    from nemo_slam.models.pretraining import SLAMPretrainingModel

RETRIEVE_AT = (1, 5, 10)
MAX_CANDIDATES = 32
"""Texts to retrieve from, and utterances to retrieve for: each of them is encoded with each."""


class EncodedPairs:
    """The pairs' speech through the speech encoder once; sequences of any of it with any text after that.

    Args:
        model: the pre-training model.
        pairs: B pairs.
    """

    def __init__(self, model: SLAMPretrainingModel, pairs: PairBatch):
        self.model = model
        features, frames = model.features(StepBatch(0, pairs=pairs))
        rows = model.speech_encoder.subsample(features, frames)
        self.lengths = subsampled_lengths(frames)
        self.starts = np.cumsum(self.lengths) - self.lengths
        segments = {"speech": Segments(self.starts[:, None], self.lengths[:, None])}
        packed = pack(segments, len(rows), rows.device, row_multiple(model.settings.pad_multiple, rows.device))
        _, projected = model.speech_encoder(gather_rows(rows, packed.gather), packed.layout)
        embedded = model.multimodal_encoder.embed_speech(projected, packed.layout.positions)
        order = torch.as_tensor(packed.rows_of("speech", 0)).to(rows.device)
        self.rows = embedded.index_select(0, order)

    def encode(
        self, speech: Sequence[int | None], tokens: Tensor, lengths: np.ndarray, cls: bool
    ) -> tuple[Tensor, PackedSequences]:
        """One sequence for each entry of ``speech`` (an utterance, or None for none) with its text.

        *Shape:* tokens (sum of lengths,) -> multimodal rows (N, D) and their plan; segments are CLS, speech, text.
        """
        model, device = self.model, self.rows.device
        lengths = np.asarray(lengths, np.int64)
        positions = torch.as_tensor(ranges(np.zeros(len(lengths), np.int64), lengths)).to(device)
        text = model.multimodal_encoder.embed_text(model.text_encoder(tokens, positions))
        width_type = torch.promote_types(self.rows.dtype, text.dtype)
        source = torch.cat([part.to(width_type) for part in (model.multimodal_encoder.cls, self.rows, text)])
        chosen = np.array([0 if i is None else i for i in speech], np.int64)
        present = np.array([i is not None for i in speech], bool)
        none = np.zeros(len(chosen), np.int64)
        starts = [none, 1 + self.starts[chosen], 1 + len(self.rows) + np.cumsum(lengths) - lengths]
        sizes = [none + cls, self.lengths[chosen] * present, lengths]
        segments = {"probe": Segments(np.stack(starts, axis=1), np.stack(sizes, axis=1))}
        packed = pack(segments, len(source), device, row_multiple(model.settings.pad_multiple, device))
        return model.multimodal_encoder(gather_rows(source, packed.gather), packed.layout), packed

    def scores(self, speech: Sequence[int], tokens: Tensor, lengths: np.ndarray) -> Tensor:
        """(S,) matching logits of utterances with texts."""
        hidden, packed = self.encode(speech, tokens, lengths, cls=True)
        rows = torch.as_tensor(packed.rows_of("probe", 0)).to(hidden.device)
        matching = self.model.objectives[Matching.name]
        assert isinstance(matching, Matching)
        return matching.head(hidden.index_select(0, rows)).squeeze(-1).float()


def probe(model: SLAMPretrainingModel, batch: StepBatch) -> ObjectiveOutput:
    """All probes that the model's objectives allow; names depend on the objectives alone, never on the batch."""
    result = ObjectiveOutput()
    if batch.pairs is None:
        return result
    pairs = EncodedPairs(model, batch.pairs)
    if TranslationLM.name in model.objectives:
        result.extend(cross_modal(model, pairs, batch.pairs))
    if Matching.name in model.objectives:
        result.metrics += matching_choice(pairs, batch.pairs)
        result.metrics += retrieval(pairs, batch.pairs)
    hidden, packed = pairs.encode(
        range(len(batch.pairs)), batch.pairs.tokens[:0], np.zeros(len(batch.pairs)), cls=False
    )
    rows = hidden[torch.as_tensor(packed.rows_of("probe", 1)).to(hidden.device)]
    result.pooled.append(Pooled("probe/effective_rank", moments(rows), partial(rank_of_moments, width=rows.shape[1])))
    return result


def cross_modal(model: SLAMPretrainingModel, pairs: EncodedPairs, batch: PairBatch) -> ObjectiveOutput:
    """Accuracy on the same masked tokens with the true speech, with that of another pair, and without any."""
    size, lengths = len(batch), batch.lengths.numpy()
    device = batch.tokens.device
    layout = SequenceLayout.build(lengths, device)  # with a tail, which the id -1 keeps from being masked
    translation_lm, text_loss = model.settings.objectives.translation_lm, model.text_loss
    assert translation_lm is not None
    assert text_loss is not None
    masking = translation_lm.token_masking
    mask = sample_spans(
        layout.cu_seqlens,
        torch.cat([batch.ids, batch.ids.new_tensor([-1])]).to(device),
        torch.zeros(size + 1, dtype=torch.int64, device=device),  # the same mask in every validation
        key=model.randomness.key("probe"),
        span=masking.span,
        rate=masking.rate,
        num_rows=layout.num_rows,
    )[: layout.num_valid]
    index = mask.nonzero().squeeze(-1)
    truth = batch.tokens.index_select(0, index)
    tokens = torch.where(mask, model.text_encoder.mask_id, batch.tokens)
    other = next_other_text(batch.text_classes.numpy())
    conditions: dict[str, tuple[Sequence[int | None], bool]] = {
        "given_speech": (range(size), True),
        "given_other_speech": (other.clip(min=0).tolist(), True),
        "without_speech": ([None] * size, False),
    }
    has_other = torch.as_tensor(np.repeat(other >= 0, lengths)).to(device)[index]
    metrics = []
    for name, (speech, cls) in conditions.items():
        hidden, packed = pairs.encode(speech, tokens, lengths, cls)
        rows = torch.as_tensor(packed.rows_of("probe", 2)).to(device)[index]
        logits = hidden.index_select(0, rows) @ model.text_encoder.output_weight.t() + text_loss.bias
        counted = has_other if name == "given_other_speech" else torch.ones_like(has_other)
        correct = ((logits.argmax(-1) == truth) & counted).sum()
        metrics.append(Metric(f"probe/text_{name}", correct, count(counted.sum(), hidden)))
    occurs = torch.bincount(truth, minlength=model.text_encoder.vocab_size)
    return ObjectiveOutput(metrics=metrics, pooled=[Pooled("probe/token_top_share", occurs, top_share)])


def next_other_text(classes: np.ndarray) -> np.ndarray:
    """The next pair, going round, whose text is of another class; -1 where there is none. *Shape:* (B,) -> (B,)."""
    size = len(classes)
    found = np.full(size, -1, np.int64)
    for i in range(size):
        differs = np.flatnonzero(np.roll(classes, -i) != classes[i])
        if len(differs):
            found[i] = (i + differs[0]) % size
    return found


def top_share(occurs: Tensor) -> float:
    """The share of the commonest; not a number where nothing occurs. *Shape:* (V,)."""
    return float(occurs.max() / occurs.sum())


def matching_choice(pairs: EncodedPairs, batch: PairBatch) -> list[Metric]:
    """The pair's own text or its negative? By the model's scores; and by the ratio of lengths alone. Ties are half."""
    everyone = range(len(batch))
    own = pairs.scores(everyone, batch.tokens, batch.lengths.numpy())
    other = pairs.scores(everyone, batch.negative_tokens, batch.negative_lengths.numpy())
    right = (own > other).sum() + 0.5 * (own == other).sum()
    guess = length_choice(batch.audio_lengths.numpy(), batch.lengths.numpy(), batch.negative_lengths.numpy())
    total = count(len(batch), own)
    return [
        Metric("probe/matching_choice", right, total),
        Metric("probe/matching_choice_by_length", count(0, own) + guess, total),
    ]


def length_choice(audio: np.ndarray, own: np.ndarray, other: np.ndarray) -> float:
    """How often the text whose length fits the audio's better is the true one; (B,) lengths.

    Fitting better is being nearer, on a log scale, to the median ratio of the other true pairs.
    """
    true, false = np.log(own / audio), np.log(other / audio)
    right = 0.0
    for i in range(len(audio)):
        usual = np.median(np.delete(true, i)) if len(audio) > 1 else true[i]
        distance = abs(true[i] - usual) - abs(false[i] - usual)
        right += 0.5 if own[i] == other[i] else float(distance < 0)
    return right


def retrieval(pairs: EncodedPairs, batch: PairBatch) -> list[Metric]:
    """For each utterance all texts by matching score; a text equal to the true one is no rival, a tie is a miss.

    Every rank must call it.
    """
    chosen = (
        np.unique(np.linspace(0, len(batch) - 1, MAX_CANDIDATES).round().astype(int)) if len(batch) else np.arange(0)
    )
    texts = [batch.tokens.split(batch.lengths.tolist())[j] for j in chosen]
    lengths = batch.lengths.numpy()[chosen]
    candidates = len(chosen)
    ranks = []
    for i in range(max(of_every_rank(candidates))):
        if i >= candidates:  # where weights are in shards, ranks meet in every layer, and so run it equally often
            pairs.scores([], batch.tokens[:0], lengths[:0])
            continue
        scores = pairs.scores([int(chosen[i])] * candidates, torch.cat(texts), lengths)
        rivals = [not torch.equal(text, texts[i]) for text in texts]
        # Not `>=`: a score that is not a number is no hit.
        better = ~(scores < scores[i]) & torch.tensor(rivals, device=scores.device)
        ranks.append(better.sum())
    rank = torch.stack(ranks) if ranks else batch.tokens.new_zeros(0)
    metrics = []
    for k in RETRIEVE_AT:
        total = count(candidates, rank.float())
        metrics.append(Metric(f"probe/retrieval_at_{k}", (rank < k).sum(), total))
        chance = count(min(k, candidates), rank.float())  # k of n for each of n utterances
        metrics.append(Metric(f"probe/retrieval_at_{k}_chance", chance, total))
    return metrics


def effective_rank(rows: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007) of centred rows (N, D)."""
    centred = rows.double() - rows.double().mean(dim=0)
    return _rank_of_products(centred.t() @ centred)


def moments(rows: Tensor) -> Tensor:
    """Sums from which rows can be centred later: products, values, number. *Shape:* (N, D) -> (D * D + D + 1,)."""
    rows = rows.double()
    return torch.cat([(rows.t() @ rows).flatten(), rows.sum(dim=0), rows.new_tensor([len(rows)])])


def rank_of_moments(sums: Tensor, width: int) -> float:
    """:func:`effective_rank` of all the rows that :func:`moments` were summed of; not a number of fewer than two rows,
    or where a row is none."""
    products, values, number = sums.split([width * width, width, 1])
    if number < 2 or not torch.isfinite(sums).all():
        return math.nan
    return float(_rank_of_products(products.view(width, width) - values.outer(values) / number))


def _rank_of_products(products: Tensor) -> Tensor:
    """*Shape:* products of centred columns (D, D) -> ()."""
    singular = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.exp(-torch.special.xlogy(share, share).sum())


class Probes(Callback):
    """Runs the probes on every validation batch; their figures join the validation's."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: StepBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        model = cast("SLAMPretrainingModel", pl_module)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            model.validation_metrics.update(probe(model, batch), {})
            model.validation_metrics.update(ObjectiveOutput(metrics=contrastive(model, outputs)), {})
