"""The packed batch gives each utterance, text and pair what it gets alone: outputs, losses, gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batch_helpers import exact_features, select

from nemo_slam.data.batch import StepBatch
from nemo_slam.models import masking
from nemo_slam.models import step as steps
from nemo_slam.models.pretraining import SLAMPretrainingModel
from nemo_slam.modules import attention
from nemo_slam.randomness import Randomness

SETTINGS = steps.StepSettings("torch", multiple=8)
CORRUPTION = masking.CorruptionConfig()


@pytest.fixture
def model(model_config):
    torch.manual_seed(0)
    model = SLAMPretrainingModel(model_config()).double().train()
    with torch.no_grad():  # leave no zero that would hide a path: biases, the modality table
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.features = exact_features
    return model


def test_mel_of_an_utterance_does_not_depend_on_its_neighbours(model_config, make_batch):
    model = SLAMPretrainingModel(model_config())
    batch = make_batch()
    together, frames = model.features(batch)
    for i in range(3):
        alone, length = model.features(one_of(batch, "speech", i))
        assert length.tolist() == [frames[i]]
        torch.testing.assert_close(together[i, :, : frames[i]], alone[0, :, : frames[i]], rtol=0, atol=1e-4)


def one_of(batch: StepBatch, stream: str, i: int) -> StepBatch:
    """The batch with a single example of one stream, and no example of the others."""
    return select(batch, {stream: [i]})


def outputs_of(model, batch):
    """{(kind, segment): rows of all its sequences in batch order}."""
    out = model(batch)
    rows = {}
    for name, request in out.multimodal.items():
        for segment in request.segments():
            rows[name, segment] = out.hidden[torch.as_tensor(out.rows(name, segment))]
    return rows, out


def test_padding_is_that_of_the_backend_in_use(model, make_batch, monkeypatch):
    """metrics.csv's padding_share; packed attention, which needs a GPU, computes the rows and nothing else."""
    batch = make_batch()
    _, out = outputs_of(model, batch)
    layout = out.packed.layout
    padded = sum(block.size * block.width for block in layout.blocks)
    assert out.volume(batch)["positions"] == layout.num_valid
    assert out.volume(batch)["attended_positions"] == padded != layout.num_rows
    monkeypatch.setattr(attention, "resolve_backend", lambda *arguments: "varlen")
    monkeypatch.setattr(attention, "varlen", attention.sdpa)
    assert model(batch).volume(batch)["attended_positions"] == layout.num_rows


def test_every_sequence_gets_what_it_gets_alone(model, make_batch):
    """Forward and gradients to 1e-9: the sum of each example's own loss, in one batch and one by one."""
    batch = make_batch()
    weight = torch.randn(32, dtype=torch.float64)

    together, _ = outputs_of(model, batch)
    sum((rows @ weight).square().sum() for rows in together.values()).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()

    alone = {key: [] for key in together}
    for stream, count in (("speech", 3), ("text", 3), ("pairs", 2)):
        for i in range(count):
            rows, _ = outputs_of(model, one_of(batch, stream, i))
            sum((value @ weight).square().sum() for value in rows.values()).backward()
            for key, value in rows.items():
                alone[key].append(value)
    for key, rows in together.items():
        torch.testing.assert_close(rows, torch.cat(alone[key]), rtol=0, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    assert gradients.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = max(gradients[name].abs().max().item(), 1.0)
            torch.testing.assert_close(
                gradients[name] / scale, parameter.grad / scale, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_losses_of_a_batch_are_the_sums_of_its_examples(model, make_batch):
    batch = make_batch()
    _, together, _ = model.losses(batch)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for stream, count in (("speech", 3), ("text", 3), ("pairs", 2)):
        for i in range(count):
            _, result, _ = model.losses(one_of(batch, stream, i))
            for loss in result.losses:
                sums[loss.name] = sums.get(loss.name, 0) + loss.total.detach()
                counts[loss.name] = counts.get(loss.name, 0) + loss.count
    for loss in together.losses:
        if not loss.name.endswith("diversity"):  # a property of the batch, not of an example
            torch.testing.assert_close(loss.total, sums[loss.name], rtol=0, atol=1e-8)
            assert loss.count == counts[loss.name]
            assert loss.count > 0, loss.name


def test_noise_in_the_padding_changes_nothing(model, make_batch):
    batch = make_batch()
    _, first, _ = model.losses(batch)
    for part in (batch.speech, batch.pairs):
        padding = torch.arange(part.audio.shape[1]) >= part.audio_lengths[:, None]
        part.audio[padding] = 7.0
    _, second, _ = model.losses(batch)
    for a, b in zip(first.losses, second.losses, strict=True):
        torch.testing.assert_close(a.total, b.total, rtol=0, atol=1e-9)


@pytest.mark.parametrize("empty", ["speech", "text", "pairs", "all"])
def test_an_empty_stream_leaves_no_parameter_without_gradient(model, make_batch, empty):
    arguments = {"speech": (), "text": (), "pairs": ()} if empty == "all" else {empty: ()}
    total, result, _ = model.losses(make_batch(**arguments))
    total.backward()
    assert torch.isfinite(total)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    for loss in result.losses:
        if loss.count == 0:
            assert loss.total == 0


@pytest.mark.parametrize(
    "objectives",
    [
        {"masked_speech": {}, "masked_text": {}},
        {"masked_speech": {}},
        {"masked_speech": {}, "masked_text": {}, "translation_lm": {}, "matching": {"input": "masked"}},
        {"masked_text": {}, "matching": {}},
    ],
    ids=["stage1", "speech only", "masked matching", "unmasked speech only"],
)
@pytest.mark.parametrize("kind", ["random", "learned"])
def test_no_unused_parameter_in_any_stage(model_config, make_batch, objectives, kind):
    model = SLAMPretrainingModel(model_config(objectives=objectives, mask_vector={"kind": kind})).train()
    batch = make_batch()
    batch = StepBatch(0, **{s: getattr(batch, s) if s in model.streams else None for s in ("speech", "text", "pairs")})
    total, _, _ = model.losses(batch)
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_masking_rates_and_places(model, make_batch):
    """About half of a long utterance is masked, and only rows of the inputs that ask for it."""
    out = model(make_batch(speech=[9.0] * 8))
    for name in ("masked_speech", "translation_lm"):
        rows = out.packed_speech.rows_of(name, 0)
        index = out.masked_speech[name].index.numpy()
        assert np.isin(index, rows).all()
        assert len(index) > 0
    rate = len(out.masked_speech["masked_speech"].index) / out.packed_speech.lengths["masked_speech"].sum()
    assert 0.35 < rate < 0.6
    unmasked = out.packed_speech.rows_of("matching", 0)
    assert not np.isin(unmasked, torch.cat([m.index for m in out.masked_speech.values()]).numpy()).any()


def filled(packed, inputs, batch, fill):
    """Every row of every input replaced, in one pass: rows by input name."""
    masks = masking.sample_masks(packed, inputs, batch, Randomness(0), "torch")
    for request, mask in zip(masks.inputs, masks.masks, strict=True):
        mask.fill_(False)[packed.rows_of(request.name, 0)] = True
    rows, _ = fill(masks)
    return [rows[packed.rows_of(request.name, 0)] for request in masks.inputs]


def test_two_inputs_of_one_example_are_filled_with_other_words(model_config, make_batch):
    """Translation LM and masked matching mask the same pairs in one pass: random vectors and tokens must differ."""
    model = SLAMPretrainingModel(model_config(objectives={"translation_lm": {}, "matching": {"input": "masked"}}))
    batch = replace(make_batch(pairs=((2.0, 40, 40),) * 3), speech=None)
    speech = [request for objective in model.objectives.values() for request in objective.speech]
    packed = steps._pack_speech(speech, batch, np.array([50, 50, 50]), torch.device("cpu"), SETTINGS)
    rows = torch.zeros(packed.layout.num_rows, 6)
    first, second = filled(
        packed, speech, batch, lambda masks: masking.mask_speech(rows, masks, Randomness(0), "torch", 1.0)
    )
    assert first.shape == second.shape == (150, 6)
    assert (first != second).double().mean() > 0.99

    text = [request for objective in model.objectives.values() for request in objective.text]
    _, packed = steps._pack_text(text, batch, torch.device("cpu"), SETTINGS, {})
    tokens = torch.zeros(packed.layout.num_rows, dtype=torch.int64)
    found = filled(
        packed,
        text,
        batch,
        lambda masks: masking.mask_text(tokens, masks, Randomness(0), "torch", model.text_encoder, CORRUPTION),
    )
    for one, other in ((0, 1), (0, 2), (1, 2)):  # a tenth is another token, a tenth the true one: in other places
        assert not torch.equal(found[one], found[other])
