"""The accuracy with another utterance's context, against loops over single frames."""

import itertools

import pytest
import torch
from batch_helpers import exact_features, select

from nemo_slam.evaluation.speech_probes import contrastive, next_utterance
from nemo_slam.models.masking import MaskedRows
from nemo_slam.models.pretraining import SLAMPretrainingModel


@pytest.fixture
def model(model_config):
    torch.manual_seed(0)
    model = SLAMPretrainingModel(model_config(quantizer={"num_codes": 5, "code_dim": 24})).double().eval()
    model.features = exact_features
    return model


@pytest.fixture
def batch(make_batch):
    return make_batch(speech=(2.3, 0.3, 1.4, 1.1, 1.9))  # 0.3 s: nothing is masked


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@torch.no_grad()
def test_accuracy_with_true_and_other_context(model, batch):
    outputs = model(batch)
    loss, masked = model.speech_loss, outputs.masked_speech["masked_speech"]
    quantized = loss.targets(outputs, masked, "masked_speech")
    distractors, _ = loss.distractors(outputs, masked, quantized, "masked_speech")
    contexts = loss.context_projection(outputs.contexts)[masked.index]
    bounds = masked.cu_seqlens.tolist()
    rows_of = [[i for i, r in enumerate(masked.index.tolist()) if a <= r < b] for a, b in itertools.pairwise(bounds)]
    rows_of = [rows for rows in rows_of if rows]
    assert len(rows_of) == 4

    right = {"contrastive_accuracy": 0, "contrastive_accuracy_other_context": 0}
    counted = 0
    for u, rows in enumerate(rows_of):
        following = rows_of[(u + 1) % 4]
        for rank, i in enumerate(rows):
            rivals = [j for j in distractors[i].tolist() if j >= 0]
            counted += bool(rivals)
            for name, reader in zip(right, (i, following[rank % len(following)]), strict=True):
                scores = [cosine(contexts[reader], quantized.vectors[j]) for j in [i, *rivals]]
                right[name] += bool(rivals) and scores[0] > max(scores[1:])
    assert counted > 30
    found = {metric.name: (float(metric.total), float(metric.count)) for metric in contrastive(model, outputs)}
    assert found == {f"probe/{name}": (n, counted) for name, n in right.items()}
    assert 0 < right["contrastive_accuracy"] < counted


@torch.no_grad()
def test_a_context_that_is_the_answer_is_right_and_of_no_use_elsewhere(model, batch, monkeypatch):
    outputs = model(batch)
    masked = outputs.masked_speech["masked_speech"]
    vectors = model.speech_loss.targets(outputs, masked, "masked_speech").vectors
    monkeypatch.setattr(model.speech_loss.context_projection, "forward", lambda rows: vectors)
    true, other = contrastive(model, outputs)
    assert true.total == true.count > 30
    assert other.total < 0.7 * other.count


@torch.no_grad()
@pytest.mark.parametrize("keep", [[], [0], [0, 1]], ids=["none", "one", "one and an unmasked one"])
def test_without_another_utterance_nothing_is_counted(model, batch, keep):
    found = contrastive(model, model(select(batch, {"speech": keep})))
    assert [(float(m.total), float(m.count)) for m in found] == [(0, 0), (0, 0)]


def test_the_next_utterance_goes_round():
    index = torch.tensor([1, 2, 4, 11, 20, 21])
    cu_seqlens = torch.tensor([0, 5, 5, 9, 12, 25, 30])  # utterances of 3, 0, 0, 1, 2 masked rows, and the tail
    other, borrowed = next_utterance(MaskedRows(index, cu_seqlens, cu_seqlens, cu_seqlens))
    assert other.tolist() == [3, 3, 3, 4, 0, 1]
    assert borrowed.all()


def test_the_frozen_quantizer_has_no_contrastive_loss(model_config, batch):
    config = model_config(
        quantizer=None,
        random_projection={"num_codes": 8, "code_dim": 4},
        speech_loss={"contrastive_weight": 0, "diversity_weight": 0},
    )
    model = SLAMPretrainingModel(config).eval()
    assert contrastive(model, model(batch)) == []
