"""Probes against the same questions asked of each pair alone, and of formulas written out."""

import csv
import math

import numpy as np
import pytest
import torch
from batch_helpers import exact_features, select

from nemo_slam.evaluation import probes
from nemo_slam.objectives.metrics import MetricAccumulator
from nemo_slam.packing import SequenceLayout

PAIRS = ((0.8, 5, 7), (1.4, 12, 10), (1.1, 9, 9), (2.0, 5, 20))


@pytest.fixture
def model(model_config):
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    torch.manual_seed(0)
    model = SLAMPretrainingModel(model_config()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.features = exact_features
    return model


@pytest.fixture
def batch(make_batch):
    return make_batch(pairs=PAIRS)


def alone(model, batch, speech, tokens, cls):
    """Multimodal rows (N, D) of one sequence, through the modules without any packing: CLS, speech, text."""
    encoder = model.multimodal_encoder
    parts = [encoder.cls] if cls else []
    if speech is not None:
        features, frames = exact_features(select(batch, {"pairs": [speech]}))
        rows = model.speech_encoder.subsample(features, frames)
        _, rows = model.speech_encoder(rows, SequenceLayout.build(np.array([len(rows)])))
        parts.append(encoder.embed_speech(rows, torch.arange(len(rows))))
    parts.append(encoder.embed_text(model.text_encoder(tokens, torch.arange(len(tokens)))))
    rows = torch.cat(parts)
    return encoder(rows, SequenceLayout.build(np.array([len(rows)])))


def figures(metrics):
    return {metric.name.removeprefix("probe/"): (float(metric.total), float(metric.count)) for metric in metrics}


def over(*outputs):
    """What a run writes of the outputs of several batches."""
    metrics = MetricAccumulator()
    for output in outputs:
        metrics.update(output, {})
    return {name.removeprefix("probe/"): value for name, value in metrics.flush().items()}


def texts_of(batch, negative=False):
    part = batch.pairs
    tokens, lengths = (part.negative_tokens, part.negative_lengths) if negative else (part.tokens, part.lengths)
    return tokens.split(lengths.tolist())


@torch.no_grad()
def test_masked_text_with_true_other_and_no_speech(model, batch, monkeypatch):
    """Each condition in turn: the texts are made what the model predicts there, so all is correct, elsewhere less."""
    masks = torch.rand(len(batch.pairs.tokens), generator=torch.Generator().manual_seed(1)) < 0.5
    monkeypatch.setattr(probes, "sample_spans", lambda *args, **options: torch.cat([masks, masks[:1]]))
    conditions = {"given_speech": [0, 1, 2, 3], "given_other_speech": [1, 2, 3, 0], "without_speech": [None] * 4}
    lengths = batch.pairs.lengths.tolist()
    inputs = torch.where(masks, 48, batch.pairs.tokens).split(lengths)
    predicted = {}
    for name, speech in conditions.items():
        rows = [
            alone(model, batch, s, text, cls=s is not None)[-len(text) :]
            for s, text in zip(speech, inputs, strict=True)
        ]
        logits = torch.cat(rows) @ model.text_encoder.embedding.weight[:48].T + model.text_loss.bias
        predicted[name] = logits.argmax(dim=1)
    for name in conditions:
        batch.pairs.tokens[masks] = predicted[name][masks]
        result = probes.cross_modal(model, probes.EncodedPairs(model, batch.pairs), batch.pairs)
        found = figures(result.metrics)
        for other in conditions:
            correct = int((predicted[other] == predicted[name])[masks].sum())
            assert found[f"text_{other}"] == (correct, int(masks.sum()))
            assert (correct == masks.sum()) == (other == name)
        masked = batch.pairs.tokens[masks].tolist()
        assert over(result)["token_top_share"] == max(masked.count(t) for t in masked) / len(masked)


@torch.no_grad()
def test_masks_come_from_the_examples_and_follow_translation_lm(model, batch):
    first, again = (
        figures(probes.cross_modal(model, probes.EncodedPairs(model, b.pairs), b.pairs).metrics)
        for b in (batch, select(batch, {"pairs": [0, 1, 2, 3]}))
    )
    assert first == again
    assert 10 <= first["text_given_speech"][1] <= 21  # about half of 31 tokens
    one = select(batch, {"pairs": [1]})
    lonely = figures(probes.cross_modal(model, probes.EncodedPairs(model, one.pairs), one.pairs).metrics)
    assert lonely["text_given_other_speech"] == (0, 0)
    assert lonely["text_given_speech"][1] > 0


@pytest.mark.parametrize(
    ("classes", "expected"),
    [([], []), ([4], [-1]), ([4, 4], [-1, -1]), ([0, 1, 2], [1, 2, 0]), ([7, 7, 3, 7], [2, 2, 3, 2])],
)
def test_other_speech_says_another_text(classes, expected):
    assert probes.next_other_text(np.array(classes, np.int64)).tolist() == expected


@torch.no_grad()
def test_a_pair_without_another_text_is_not_counted(model, batch):
    batch.pairs.text_classes[:] = 3
    found = figures(probes.cross_modal(model, probes.EncodedPairs(model, batch.pairs), batch.pairs).metrics)
    assert found["text_given_other_speech"] == (0, 0)
    assert found["text_given_speech"][1] > 0


@torch.no_grad()
def test_figures_of_shares_are_those_of_the_whole(model, batch):
    """What is no mean of means, whichever ranks and batches hold the pairs; one share has none, one a single pair."""
    whole = over(probes.probe(model, batch))
    shares = over(*(probes.probe(model, select(batch, {"pairs": part})) for part in ([2], [], [0, 3], [1])))
    for name in ("effective_rank", "token_top_share", "text_given_speech"):
        assert shares[name] == pytest.approx(whole[name], rel=1e-5), name
    pairs = probes.EncodedPairs(model, batch.pairs)
    hidden, packed = pairs.encode(range(4), batch.pairs.tokens[:0], np.zeros(4), cls=False)
    rank = float(probes.effective_rank(hidden[: packed.layout.num_valid]))
    assert whole["effective_rank"] == pytest.approx(rank, rel=1e-5)


@torch.no_grad()
def test_scores_are_those_of_matching(model, batch):
    pairs = probes.EncodedPairs(model, batch.pairs)
    outputs = model(batch)
    matching = model.objectives["matching"]
    for name, tokens, lengths in (
        ("matching", batch.pairs.tokens, batch.pairs.lengths),
        ("matching_negative", batch.pairs.negative_tokens, batch.pairs.negative_lengths),
    ):
        expected = matching.scores(outputs, name).float()
        torch.testing.assert_close(pairs.scores(range(4), tokens, lengths.numpy()), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_choice_and_retrieval_count_pairs_one_by_one(model, batch, monkeypatch):
    texts, negatives = texts_of(batch), texts_of(batch, negative=True)

    def score(speech, tokens):
        hidden = alone(model, batch, speech, tokens, cls=True)[0]
        return float(model.objectives["matching"].head(hidden))

    pairs = probes.EncodedPairs(model, batch.pairs)
    chosen = figures(probes.matching_choice(pairs, batch.pairs))["matching_choice"]
    assert chosen == (sum(score(i, texts[i]) > score(i, negatives[i]) for i in range(4)), 4)

    monkeypatch.setattr(probes, "RETRIEVE_AT", (1, 2, 3, 5))
    found = figures(probes.retrieval(pairs, batch.pairs))
    table = [[score(i, text) for text in texts] for i in range(4)]
    for k in (1, 2, 3, 5):
        hits = sum(sorted(row, reverse=True).index(row[i]) < k for i, row in enumerate(table))
        assert found[f"retrieval_at_{k}"] == (hits, 4)
        assert found[f"retrieval_at_{k}_chance"] == (min(k, 4), 4)


@torch.no_grad()
def test_retrieval_takes_no_equal_text_for_a_rival_and_a_tie_for_a_miss(model, batch, monkeypatch):
    batch.pairs.tokens[-5:] = batch.pairs.tokens[:5]  # pairs 0 and 3 say the same
    monkeypatch.setattr(probes.EncodedPairs, "scores", lambda self, speech, tokens, lengths: torch.zeros(len(lengths)))
    monkeypatch.setattr(probes, "RETRIEVE_AT", (1, 2, 3, 4))
    found = figures(probes.retrieval(probes.EncodedPairs(model, batch.pairs), batch.pairs))
    assert [found[f"retrieval_at_{k}"][0] for k in (1, 2, 3, 4)] == [0, 0, 2, 4]


@torch.no_grad()
def test_scores_that_are_no_numbers_retrieve_nothing(model, batch, monkeypatch):
    monkeypatch.setattr(probes.EncodedPairs, "scores", lambda *_: torch.full((4,), math.nan))
    assert figures(probes.retrieval(probes.EncodedPairs(model, batch.pairs), batch.pairs))["retrieval_at_1"] == (0, 4)


def test_choice_by_length():
    audio = np.array([100, 200, 300, 400])
    own = np.array([10, 20, 30, 40])
    assert probes.length_choice(audio, own, np.array([20, 10, 60, 41])) == 4
    assert probes.length_choice(audio, own, own) == 2  # nothing to choose by
    # The true text of the last is much too long for its audio: its negative looks better.
    assert probes.length_choice(audio, np.array([10, 20, 30, 90]), np.array([20, 10, 60, 41])) == 3


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_effective_rank(rank):
    """Rows in a subspace with equal spread have its dimension; anything else lies below, by the formula."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q[:rank]
    signs = torch.cat([torch.eye(rank, dtype=torch.float64), -torch.eye(rank, dtype=torch.float64)])
    assert probes.effective_rank(signs @ basis + 5.0).item() == pytest.approx(rank, rel=1e-5)
    rows = torch.randn(50, rank, generator=generator, dtype=torch.float64) @ basis
    singular = np.linalg.svd((rows - rows.mean(0)).numpy(), compute_uv=False)[:rank]
    share = singular / singular.sum()
    expected = np.exp(-(share * np.log(share)).sum())
    assert probes.effective_rank(rows).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [torch.zeros(0, 3), torch.ones(1, 3), torch.full((4, 3), math.nan)])
def test_no_rank_of_too_few_rows_or_of_no_numbers(rows):
    assert math.isnan(probes.rank_of_moments(probes.moments(rows), 3))


@torch.no_grad()
@pytest.mark.parametrize("pairs", [(), PAIRS[:1]], ids=["none", "one"])
def test_names_do_not_depend_on_the_batch(model, batch, make_batch, pairs):
    every, few = probes.probe(model, batch), probes.probe(model, make_batch(pairs=pairs))
    names = [metric.name for metric in every.metrics]
    assert [metric.name for metric in few.metrics] == names
    assert [(p.name, p.sums.shape) for p in few.pooled] == [(p.name, p.sums.shape) for p in every.pooled]
    assert len({*names, *(pooled.name for pooled in every.pooled)}) == len(names) + 2 == 13
    assert all(torch.isfinite(torch.as_tensor(metric.total)) for metric in few.metrics)
    assert all(torch.isfinite(pooled.sums).all() for pooled in few.pooled)


@pytest.mark.parametrize("probing", [True, False])
def test_validation_reports_them(pretrain_config, probing):
    from nemo_slam.training.pretrain import pretrain

    folder = pretrain(pretrain_config(2, "trainer.max_steps=5", f"probes={str(probing).lower()}"))
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"] == ""]
    names = {name for name in rows[0] if name.startswith("val_probe/")}
    assert len(names) == (15 if probing else 0)
    for name in names - {"val_probe/effective_rank"}:
        assert 0 <= float(rows[0][name]) <= 1
    if probing:
        assert 1 < float(rows[0]["val_probe/effective_rank"]) < 32
