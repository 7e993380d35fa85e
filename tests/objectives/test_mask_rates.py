"""The masking of a step: rates equal the exact expectation for their length, no span leaves its sequence."""

import numpy as np
import pytest
import torch

from nemo_slam.data.batch import PairBatch, SpeechBatch, StepBatch, TextBatch
from nemo_slam.models import masking
from nemo_slam.models import step as steps
from nemo_slam.models.pretraining import SLAMPretrainingModel
from nemo_slam.models.step import StepSettings
from nemo_slam.objectives.inputs import SpeechInput, SpeechMasking, TextInput, TokenMasking
from nemo_slam.randomness import Randomness

SETTINGS = StepSettings("torch", multiple=8)
COUNT = 400


def identity(count, epoch=0):
    return {"ids": torch.arange(count), "epochs": torch.full((count,), epoch, dtype=torch.int64)}


def masked_runs(mask):
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return edges[1::2] - edges[::2]


def speech_masks(length, probability, count=COUNT, stream="speech"):
    """Masks (count, length) of utterances of one length, masked as a step does, beside shorter and unmasked ones."""
    lengths = np.concatenate([np.full(count, length), [7, 9]])
    none = torch.zeros(len(lengths), 0), torch.zeros(len(lengths), dtype=torch.int64)
    nothing = (torch.zeros(0, dtype=torch.int64),) * 4
    batch = StepBatch(
        0,
        speech=SpeechBatch(*none, **identity(len(lengths))) if stream == "speech" else None,
        pairs=PairBatch(*none, *nothing, torch.arange(len(lengths)), **identity(len(lengths)))
        if stream == "pairs"
        else None,
    )
    inputs = [
        SpeechInput("masked", stream, SpeechMasking(probability)),
        SpeechInput("plain", stream),
    ]
    packed = steps._pack_speech(inputs, batch, lengths, torch.device("cpu"), SETTINGS)
    masks = masking.sample_masks(packed, inputs, batch, Randomness(5), "torch")
    rows = torch.ones(packed.layout.num_rows, 2)
    rows, masked = masking.mask_speech(rows, masks, Randomness(5), "torch", torch.tensor([4.0, 4.0]))
    changed = (rows == 4).all(dim=1).numpy()
    assert np.flatnonzero(changed).tolist() == masked["masked"].index.tolist()
    assert not changed[packed.rows_of("plain", 0)].any()
    assert not changed[packed.layout.num_valid :].any()
    own = changed[packed.rows_of("masked", 0)]
    assert not own[count * length :].any()  # 7 and 9 rows: no whole span of 10 fits
    return own[: count * length].reshape(count, length)


def expected_rate(length, probability, span=10):
    """A row is left alone if no span starts at any of the places from which one would cover it."""
    covering = [min(t, length - span) - max(0, t - span + 1) + 1 for t in range(length)] if length >= span else [0]
    return np.mean([1 - (1 - probability) ** max(starts, 0) for starts in covering])


@pytest.mark.parametrize("length", [10, 15, 20, 50, 100, 400])
@pytest.mark.parametrize("probability", [0.065, 0.129])
def test_speech_rate_for_its_length(length, probability):
    rates = speech_masks(length, probability).mean(axis=1)
    error = rates.std(ddof=1) / np.sqrt(COUNT)
    assert abs(rates.mean() - expected_rate(length, probability)) < 3 * error


@pytest.mark.parametrize(("probability", "nominal", "stream"), [(0.065, 0.49, "speech"), (0.129, 0.75, "pairs")])
def test_speech_rate_is_nominal_at_1500_frames(probability, nominal, stream):
    rates = speech_masks(1500, probability, count=100, stream=stream).mean(axis=1)
    assert abs(rates.mean() - nominal) < 0.01
    assert abs(rates.mean() - expected_rate(1500, probability)) < 3 * rates.std(ddof=1) / 10


@pytest.mark.parametrize("length", [10, 11, 19, 73])
def test_spans_of_frames_are_whole_and_stay_in_their_sequence(length):
    """Neighbours have the same length: a span that left its sequence would leave a shorter run on one side."""
    masks = speech_masks(length, 0.129)
    assert masks.any()
    assert min(runs.min() for runs in map(masked_runs, masks) if len(runs)) >= 10


def text_masks(length, rate, count=COUNT, stream="text"):
    lengths = torch.cat([torch.full((count,), length), torch.tensor([1, 3])])
    tokens = torch.arange(int(lengths.sum())) % 40
    audio = torch.zeros(len(lengths), 0), torch.zeros(len(lengths), dtype=torch.int64)
    batch = StepBatch(
        0,
        text=TextBatch(tokens, lengths, **identity(len(lengths))) if stream == "text" else None,
        pairs=PairBatch(*audio, tokens, lengths, tokens, lengths, torch.arange(len(lengths)), **identity(len(lengths)))
        if stream == "pairs"
        else None,
    )
    inputs = [TextInput("masked", stream, TokenMasking(rate)), TextInput("plain", stream)]
    _, packed = steps._pack_text(inputs, batch, torch.device("cpu"), SETTINGS, {})
    masks = masking.sample_masks(packed, inputs, batch, Randomness(5), "torch")
    mask = masks.union()[0].numpy()
    assert not mask[packed.rows_of("plain", 0)].any()
    assert not mask[packed.layout.num_valid :].any()
    return mask[packed.rows_of("masked", 0)][: count * length].reshape(count, length)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 9, 15, 40, 200, 1500])
@pytest.mark.parametrize(("rate", "stream"), [(0.15, "text"), (0.5, "pairs")])
def test_text_rate_is_nominal_at_every_length(length, rate, stream):
    """Whole spans, their number rounded by chance; no more than fit without overlap."""
    span = min(5, length)
    wanted = rate * length / span
    low, up = int(wanted), wanted - int(wanted)
    expected = ((1 - up) * min(low, length // span) + up * min(low + 1, length // span)) * span / length
    assert expected == pytest.approx(rate, abs=0.06 if length == 9 else 1e-12)
    rates = text_masks(length, rate, stream=stream).mean(axis=1)
    error = rates.std(ddof=1) / np.sqrt(COUNT)
    assert abs(rates.mean() - expected) <= 3 * error + 1e-12


@pytest.mark.parametrize("length", [1, 3, 5, 12, 40])
def test_spans_of_tokens_are_whole_and_stay_in_their_sequence(length):
    masks = text_masks(length, 0.5)
    lengths = np.concatenate([masked_runs(mask) for mask in masks])
    assert len(lengths) > 0
    assert (lengths % min(5, length) == 0).all()


def test_masks_of_another_epoch_and_another_seed_differ():
    length = torch.tensor([200])
    batch = [
        StepBatch(0, text=TextBatch(torch.zeros(200, dtype=torch.int64), length, **identity(1, e))) for e in (0, 1)
    ]
    inputs = [TextInput("masked", "text", TokenMasking(0.15))]
    masks = []
    for seed, part in ((5, batch[0]), (5, batch[1]), (6, batch[0]), (5, batch[0])):
        _, packed = steps._pack_text(inputs, part, torch.device("cpu"), SETTINGS, {})
        masks.append(masking.sample_masks(packed, inputs, part, Randomness(seed), "torch").masks[0])
    assert torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (1.0, 0.0), (0.2, 0.5), (0.0, 0.0)])
def test_masked_tokens_are_corrupted_in_the_shares_of_the_config(model_config, make_batch, monkeypatch, mask, random):
    """What the text encoder reads: [MASK], another piece (a 47th of the random ones is the true one) or the truth."""
    model = SLAMPretrainingModel(model_config(corruption={"mask": mask, "random": random})).train()
    read = []
    encode = model.text_encoder.forward
    monkeypatch.setattr(
        model.text_encoder, "forward", lambda tokens, *rest: (read.append(tokens), encode(tokens, *rest))[1]
    )
    out = model(make_batch(text=[400] * 40))
    index = torch.cat([rows.index for rows in out.masked_text.values()])
    found, truth = read[0][index], out.tokens[index]
    masked = (found == model.text_encoder.mask_id).double().mean().item()
    true = (found == truth).double().mean().item()
    assert len(index) > 2000
    assert masked == pytest.approx(mask, abs=0.04 if 0 < mask < 1 else 0)
    assert true == pytest.approx(1 - mask - random * 46 / 47, abs=0.04 if 0 < mask < 1 else 0)
    rest = torch.ones(len(read[0]), dtype=torch.bool)
    rest[index] = False
    assert torch.equal(read[0][rest], out.tokens[rest])


def test_impossible_shares_are_refused(model_config):
    with pytest.raises(ValueError, match=r"model.corruption: mask and random are shares .* got 0.8 and 0.3"):
        SLAMPretrainingModel(model_config(corruption={"mask": 0.8, "random": 0.3}))
