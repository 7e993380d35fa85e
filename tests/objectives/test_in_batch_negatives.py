"""Negatives by similarity within the batch, against NumPy loops written from ALBEF's formulas."""

import numpy as np
import pytest
import torch
from batch_helpers import select

from nemo_slam.data.batch import PairBatch
from nemo_slam.models.pretraining import SLAMPretrainingModel
from nemo_slam.objectives.in_batch_negatives import InBatchNegatives, mean_rows
from slam_kernels import gumbel_noise

PAIRS = ((1.2, 5, 7), (2.0, 12, 10), (0.9, 8, 9), (1.6, 6, 3), (1.1, 9, 4))
OBJECTIVES = {"matching": {"negatives": "in_batch"}, "masked_text": {}}


@pytest.fixture
def model(build_model):
    return build_model(objectives=OBJECTIVES)


@pytest.fixture
def batch(make_batch):
    """Pairs 1 and 3 say the same; the others differ."""
    batch = make_batch(pairs=PAIRS)
    batch.pairs.text_classes = torch.tensor([4, 7, 9, 7, 2])
    return batch


def texts_of(tokens, lengths):
    return [text.tolist() for text in tokens.split(lengths.tolist())]


def pooled(model, outputs, batch):
    """Means over each pair's speech rows and over its tokens' embeddings, one by one."""
    rows = torch.as_tensor(outputs.packed_speech.rows_of("matching", 0))
    speech = outputs.contexts.detach()[rows].split(outputs.packed_speech.lengths["matching"][:, 0].tolist())
    embedding = model.text_encoder.embedding.weight.detach().numpy()
    text = [
        np.mean([embedding[t] for t in tokens], axis=0) for tokens in texts_of(batch.pairs.tokens, batch.pairs.lengths)
    ]
    return np.stack([utterance.numpy().mean(axis=0) for utterance in speech]), np.stack(text)


def similarities(head, speech, text):
    def side(rows, projection):
        normal = (rows - rows.mean(axis=1, keepdims=True)) / np.sqrt(rows.var(axis=1, keepdims=True) + 1e-5)
        rows = normal @ projection.weight.detach().numpy().T + projection.bias.detach().numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return side(speech, head.speech) @ side(text, head.text).T / 0.07


def test_the_drawn_texts_are_packed(model, batch):
    """The draw is softmax(similarity) over the other texts by Gumbel's maximum; the text is that pair's own."""
    outputs = model(batch)
    table = similarities(model.objectives["matching"].in_batch, *pooled(model, outputs, batch))
    chosen = outputs.chosen_texts["matching_negative"]
    torch.testing.assert_close(chosen.by_utterance, torch.as_tensor(table), rtol=0, atol=1e-9)
    assert torch.equal(chosen.by_text, chosen.by_utterance.t())
    classes = batch.pairs.text_classes.tolist()
    ids = batch.pairs.ids + (2 << 56)
    noise = gumbel_noise(
        torch.arange(5),
        torch.arange(6, dtype=torch.int32),
        ids,
        batch.pairs.epochs,
        key=outputs.randomness.key("in_batch_negatives"),
        num=5,
        dtype=torch.float64,
    ).numpy()
    own = texts_of(batch.pairs.tokens, batch.pairs.lengths)
    rows = outputs.packed_text.rows_of("matching_negative", 0)
    packed = texts_of(outputs.tokens[rows], torch.as_tensor(outputs.packed_text.lengths["matching_negative"][:, 0]))
    expected = []
    for i in range(5):
        others = [j for j in range(5) if classes[j] != classes[i]]
        expected.append(max(others, key=lambda j, i=i: table[i, j] + noise[i, j]))
    assert chosen.index.tolist() == expected
    assert packed == [own[j] for j in expected]
    multimodal = outputs.packed.lengths["matching_negative"]
    assert multimodal[:, 2].tolist() == [len(own[j]) for j in expected]


def test_the_draw_follows_the_similarities():
    head = InBatchNegatives(4).double()
    count, epochs = 4000, 3
    table = torch.tensor([[9.0, 0.0, 1.0, -1.0]]).double().expand(4, 4)
    head.similarities = lambda speech, text: table
    found = np.zeros(4)
    nothing = torch.zeros(4, dtype=torch.int64)
    for number in range(count // epochs):
        for epoch in range(epochs):
            pairs = PairBatch(*[nothing] * 6, torch.arange(4), nothing + number, nothing + epoch)
            chosen = head(torch.zeros(4, 4), torch.zeros(4, 4), pairs, key=7, backend="torch")
            found[chosen.index[0]] += 1
    share = np.exp([0.0, 1.0, -1.0]) / np.exp([0.0, 1.0, -1.0]).sum()  # the first text is utterance 0's own
    error = np.sqrt(share * (1 - share) / found.sum())
    assert found[0] == 0
    assert (np.abs(found[1:] / found.sum() - share) < 4 * error).all()


def test_loss_and_gradients(model, batch):
    outputs = model(batch)
    head = model.objectives["matching"].in_batch
    result = head.losses(outputs.chosen_texts["matching_negative"], "matching", 0.5)
    (loss,), (accuracy, share) = result.losses, result.metrics
    table = similarities(head, *pooled(model, outputs, batch))
    classes = batch.pairs.text_classes.tolist()
    total, right = 0.0, 0
    for i in range(5):
        others = [i, *(j for j in range(5) if classes[j] != classes[i])]
        total -= (table[i, i] - np.log(np.exp(table[i, others]).sum())) / 2
        total -= (table[i, i] - np.log(np.exp(table[others, i]).sum())) / 2
        right += max(others, key=lambda j, i=i: table[i, j]) == i
    assert (loss.name, loss.weight, loss.count) == ("matching/contrast", 0.5, 5)
    assert loss.total.item() == pytest.approx(total, abs=1e-9)
    assert (accuracy.total, accuracy.count) == (right, 5)
    assert (share.total, share.count) == (5, 5)
    loss.total.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    prefix = "objectives.matching.in_batch."
    assert reached == {f"{prefix}{side}.{kind}" for side in ("speech", "text") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("keep", "fallback"), [([], []), ([2], [True]), ([1, 3], [True, True]), ([0, 1, 3], [False, False, False])]
)
def test_where_no_other_text_is_the_streams_negative_stays(model, batch, keep, fallback):
    part = select(batch, {"pairs": keep, "text": [0]})
    total, _, outputs = model.losses(part)
    index = outputs.chosen_texts["matching_negative"].index
    assert (index == -1).tolist() == fallback
    rows = outputs.packed_text.rows_of("matching_negative", 0)
    packed = texts_of(outputs.tokens[rows], torch.as_tensor(outputs.packed_text.lengths["matching_negative"][:, 0]))
    negatives = texts_of(part.pairs.negative_tokens, part.pairs.negative_lengths) if keep else [[]]
    own = texts_of(part.pairs.tokens, part.pairs.lengths)
    for i, stays in enumerate(fallback):
        assert packed[i] == (negatives[i] if stays else own[index[i]])
        assert part.pairs.text_classes[index[i]] != part.pairs.text_classes[i] or stays
    total.backward()
    assert torch.isfinite(total)
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


def test_the_choice_is_a_function_of_seed_epoch_and_batch(model, batch):
    def chosen():
        return model(batch).chosen_texts["matching_negative"].index.tolist()

    first = chosen()
    assert chosen() == first
    others = []
    for epoch in range(1, 6):
        batch.pairs.epochs = torch.full_like(batch.pairs.epochs, epoch)
        others.append(chosen())
    assert any(other != first for other in others)


def test_means_of_sequences():
    rows = torch.arange(12.0).view(6, 2)
    found = mean_rows(rows, np.array([1, 3, 2]))
    assert found.tolist() == [[0.0, 1.0], [4.0, 5.0], [9.0, 10.0]]
    assert mean_rows(rows[:0], np.zeros(0, np.int64)).shape == (0, 2)


def test_an_unknown_kind_is_an_error(model_config):
    with pytest.raises(ValueError, match=r"model\.objectives\.matching.*'hard' is not one of stream, in_batch"):
        SLAMPretrainingModel(model_config(objectives={"matching": {"negatives": "hard"}}))
