"""Noise on masked speech: a function of the example, at the ratio asked for, and nothing that the targets see."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batch_helpers import select

from nemo_slam.data.batch import SpeechBatch
from nemo_slam.models.augmentation import AugmentationConfig, add_noise, plan_noise
from nemo_slam.randomness import Randomness

ALWAYS = AugmentationConfig(probability=1.0, min_snr=3.0, max_snr=3.0, min_share=0.2, max_share=0.9)


def speech(seconds, first=0, epoch=0):
    lengths = torch.tensor([round(16000 * s) for s in seconds])
    audio = torch.randn(len(lengths), int(lengths.max()), generator=torch.Generator().manual_seed(5))
    audio *= torch.arange(audio.shape[1]) < lengths[:, None]
    return SpeechBatch(audio, lengths, torch.arange(len(lengths)) + first, torch.full((len(lengths),), epoch))


def noisy(batch, config=ALWAYS, seed=3):
    return add_noise(batch, config, Randomness(seed), "torch").audio


def test_ratio_and_stretch():
    batch = speech([1.0, 0.777, 2.5, 0.005])
    plan, added = plan_noise(batch, ALWAYS, 3), noisy(batch) - batch.audio
    rows = -(-batch.audio_lengths.numpy() // 160)
    assert ((plan.size >= np.floor(0.2 * rows)) & (plan.size <= np.maximum(np.ceil(0.9 * rows), 1))).all()
    for i, length in enumerate(batch.audio_lengths.tolist()):
        begin, end = plan.start[i] * 160, min((plan.start[i] + plan.size[i]) * 160, length)
        assert 0 <= begin < end <= length
        noise = added[i].double().numpy()
        assert not noise[:begin].any()
        assert not noise[min(end + 63, length) :].any()  # the filter rings for its own length
        assert (noise[begin:end] != 0).mean() > 0.99
        clean = batch.audio[i, :length].double().square().mean().item()
        assert 10 * np.log10(clean / (np.square(noise).sum() / (end - begin))) == pytest.approx(3.0, abs=1e-3)


def test_noise_is_gaussian_with_the_colour_of_the_plan():
    batch, config = speech([30.0] * 4), AugmentationConfig(1.0, 0.0, 0.0, 1.0, 1.0)
    plan, added = plan_noise(batch, config, 3), noisy(batch, config) - batch.audio
    assert np.ptp(plan.colour) > 0.1
    for colour, noise in zip(plan.colour, added.double().numpy(), strict=True):
        noise = noise[64:] / noise[64:].std()
        assert abs(np.mean(noise**4) - 3) < 0.2
        for lag in (1, 5):  # the autocorrelation of a first-order filter
            assert abs(np.mean(noise[lag:] * noise[:-lag]) - colour**lag) < 0.03


def test_an_example_gets_the_same_noise_in_any_batch():
    together = speech([1.0, 0.7, 1.9])
    added = noisy(together)
    for i, length in enumerate(together.audio_lengths.tolist()):
        alone = SpeechBatch(
            together.audio[i : i + 1, :length],
            together.audio_lengths[i : i + 1],
            together.ids[i : i + 1],
            together.epochs[i : i + 1],
        )
        torch.testing.assert_close(noisy(alone)[0], added[i, :length], rtol=0, atol=1e-5)
    assert torch.equal(noisy(together), added)
    for other in (noisy(together, seed=4), noisy(speech([1.0, 0.7, 1.9], epoch=1)), noisy(speech([1.0, 0.7, 1.9], 9))):
        assert not torch.allclose(other, added, atol=0.1)


def test_share_of_augmented_utterances():
    batch = speech([0.05] * 2000)
    changed = (noisy(batch, AugmentationConfig(probability=0.2)) != batch.audio).any(dim=1).double().mean()
    assert abs(changed - 0.2) < 3 * (0.16 / 2000) ** 0.5
    assert torch.equal(noisy(batch, AugmentationConfig(probability=0.0)), batch.audio)


def test_silence_stays_silence():
    batch = speech([0.5])
    batch.audio.zero_()
    assert torch.equal(noisy(batch), batch.audio)


@pytest.fixture
def models(model_config):
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    def build(augmentation):
        torch.manual_seed(0)
        return SLAMPretrainingModel(model_config(augmentation=augmentation)).train()

    return build(None), build({"probability": 1.0, "min_snr": 0.0, "max_snr": 5.0})


def test_the_input_is_noisy_and_the_targets_are_clean(models, make_batch):
    batch, (plain, augmented) = make_batch(), models
    outputs = [model(batch) for model in models]
    torch.testing.assert_close(outputs[0].features, outputs[1].features)
    targets = [
        model.speech_loss.targets(out, out.masked_speech["masked_speech"], "masked_speech")
        for model, out in zip(models, outputs, strict=True)
    ]
    assert torch.equal(targets[0].code_ids, targets[1].code_ids)
    rows = {name: outputs[0].packed_speech.rows_of(name, 0) for name in ("masked_speech", "translation_lm", "matching")}
    contexts = [out.contexts.detach() for out in outputs]
    assert not torch.allclose(*(c[rows["masked_speech"]] for c in contexts), atol=1e-2)
    for name in ("translation_lm", "matching"):  # the pairs' speech stays clean
        torch.testing.assert_close(*(c[rows[name]] for c in contexts))
    total, _, _ = augmented.losses(batch)
    total.backward()
    assert [name for name, p in augmented.named_parameters() if p.grad is None] == []
    augmented.eval()
    plain.eval()
    torch.testing.assert_close(augmented(batch).contexts, plain(batch).contexts)


def test_what_is_encoded_is_the_noisy_audio(models, make_batch):
    batch, (plain, augmented) = select(make_batch(), {"speech": [0, 1, 2]}), models
    config = augmented.settings.augmentation
    by_hand = plain(replace(batch, speech=add_noise(batch.speech, config, Randomness(3), "torch")))
    ours = augmented(batch)
    torch.testing.assert_close(ours.contexts, by_hand.contexts, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours.features, by_hand.features, atol=1e-2)


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ({"probability": 1.5}, "probability must lie in"),
        ({"min_share": 0.0}, "0 < min_share <= max_share <= 1"),
        ({"min_snr": 30.0}, r"min_snr \(30.0\) is above max_snr \(20.0\)"),
        ({"probabilty": 0.5}, "unknown key 'probabilty'.*did you mean 'probability'"),
    ],
)
def test_wrong_settings(model_config, augmentation, message):
    from nemo_slam.models.settings import model_settings

    with pytest.raises(ValueError, match=message):
        model_settings(model_config(augmentation=augmentation))


def test_augmentation_without_masked_speech_is_an_error(model_config):
    from nemo_slam.models.settings import model_settings

    with pytest.raises(ValueError, match="augmentation is of masked_speech's input"):
        model_settings(model_config(augmentation={}, objectives={"masked_text": {}}))
