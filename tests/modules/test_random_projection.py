"""The random-projection quantizer against BEST-RQ's formula, and as the targets of a step."""

import numpy as np
import pytest
import torch
from batch_helpers import exact_features

from nemo_slam.modules import random_projection
from nemo_slam.modules.random_projection import RandomProjectionConfig, RandomProjectionQuantizer

FROZEN = {
    "quantizer": None,
    "random_projection": {"num_codes": 32, "code_dim": 6},
    "speech_loss": {"contrastive_weight": 0.0, "diversity_weight": 0.0},
}


def nearest(quantizer, rows):
    """argmin over entries of || norm(entry) - norm(A x) ||, section 3.1, one row after another."""
    entries = quantizer.codebook.double().numpy()
    entries = entries / np.linalg.norm(entries, axis=1, keepdims=True)
    found = []
    for row in rows.double().numpy():
        projected = quantizer.projection.double().numpy().T @ row
        found.append(int(np.argmin(np.linalg.norm(entries - projected / np.linalg.norm(projected), axis=1))))
    return found


@pytest.mark.parametrize("rows", [0, 1, 700])
def test_codes_are_the_nearest_entries(rows, monkeypatch):
    monkeypatch.setattr(random_projection, "CHUNK", 256)
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(RandomProjectionConfig(), 320)
    assert quantizer.codebook.shape == (8192, 16)
    features = torch.randn(rows, 320)
    codes = quantizer.double()(features)
    assert codes.tolist() == nearest(quantizer, features)
    assert torch.equal(quantizer(100 * features), codes)  # the length of a row says nothing


def test_nothing_in_it_is_trained_and_it_is_saved():
    quantizer = RandomProjectionQuantizer(RandomProjectionConfig(8, 4), 320)
    assert list(quantizer.parameters()) == []
    assert set(quantizer.state_dict()) == {"projection", "codebook"}


@pytest.fixture
def model(model_config):
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    torch.manual_seed(0)
    model = SLAMPretrainingModel(model_config(**FROZEN)).double().train()
    model.features = exact_features
    return model


def test_targets_are_codes_of_four_frames_of_the_mel(model, make_batch):
    """Values and gradients of the one loss, with targets from the utterances' own mel, cut up here."""
    batch = make_batch(speech=(1.55, 1.02, 2.03))
    outputs = model(batch)
    loss = model.objectives["masked_speech"].loss
    result = model.objectives["masked_speech"](outputs)
    assert [item.name for item in result.losses] == ["masked_speech/codes"]

    mel, frames = exact_features(batch)
    rows = outputs.packed_speech.rows_of("masked_speech", 0).tolist()
    shared = outputs.rows("masked_speech", "speech").tolist()
    masked, total, place = outputs.masked_speech["masked_speech"].index.tolist(), 0, 0
    codes = []
    for i in range(3):
        padded = torch.nn.functional.pad(mel[i, :, : frames[i]].T, (0, 0, 0, 3))
        for t in range(-(-int(frames[i]) // 4)):
            if rows[place] in masked:
                (code,) = nearest(loss.quantizer, padded[4 * t : 4 * t + 4].reshape(1, -1))
                logits = loss.code_head.weight @ outputs.hidden[shared[place]] + loss.code_head.bias
                total = total + logits.logsumexp(0) - logits[code]
                codes.append(code)
            place += 1
    assert len(codes) == len(masked) == result.losses[0].count > 20
    assert torch.bincount(torch.tensor(codes), minlength=32).tolist() == result.histograms[0].counts.tolist()
    torch.testing.assert_close(result.losses[0].total, total, rtol=1e-9, atol=1e-9)
    for leaf in (outputs.hidden, loss.code_head.weight):
        ours, reference = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (result.losses[0].total, total))
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("empty", [None, "speech", "pairs"])
def test_no_parameter_is_left_without_gradient(model, make_batch, empty):
    total, _, _ = model.losses(make_batch(**({empty: ()} if empty else {})))
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speech_loss": {"diversity_weight": 0.0}}, "random_projection has no trained targets.*got 1.0 and 0.0"),
        ({"quantizer": {"num_codes": 16}}, "exactly one of quantizer and random_projection"),
        ({"random_projection": None}, "exactly one of quantizer and random_projection"),
        ({"random_projection": {"num_code": 3}}, "unknown key 'num_code'; did you mean 'num_codes'"),
        ({"preprocessor": {"normalize": None, "features": 80, "dither": 0.0}}, "model.preprocessor.normalize must be"),
        ({"preprocessor": {"sample_rate": 8000, "features": 80}}, "preprocessor.sample_rate is 8000, but all audio"),
    ],
)
def test_what_does_not_go_together_is_an_error(model_config, changes, message):
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    preprocessor = {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor"}
    if "preprocessor" in changes:
        changes = {"preprocessor": {**preprocessor, **changes["preprocessor"]}}
    with pytest.raises(ValueError, match=message):
        SLAMPretrainingModel(model_config(**{**FROZEN, **changes}))
