"""Each loss equals a plain float64 reference written from the papers' formulas: values and gradients."""

from collections import Counter

import plain_losses as plain
import pytest
import torch

from slam_kernels import gumbel_noise, sample_distractors

SPEECH = (2.3, 0.7, 0.25, 1.4, 1.1)  # 0.25 s is shorter than a span: an utterance without a masked frame
TEXT = (9, 14, 30, 2)
PAIRS = ((1.2, 5, 7), (2.0, 12, 10), (0.9, 8, 9))
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def batch(make_batch):
    return make_batch(speech=SPEECH, text=TEXT, pairs=PAIRS)


def objective(model, name):
    return model.objectives[name]


def gradients(loss, leaves):
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(leaves.items(), found, strict=True)}


def assert_equal_gradients(ours, reference):
    for name, gradient in reference.items():
        torch.testing.assert_close(ours[name], gradient, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().max() > 0, f"{name}: a gradient of zero compares nothing"


def speech_step(model, outputs, batch, name):
    """What the references of the speech losses are given."""
    loss = objective(model, "masked_speech").loss
    rows = outputs.masked_speech[name]
    where = (rows.index, rows.cu_seqlens, rows.ids, rows.epochs)
    noise = gumbel_noise(*where, key=outputs.randomness.key(f"gumbel/{name}"), num=16, dtype=torch.float64)
    distractors = sample_distractors(*where, key=outputs.randomness.key(f"distractors/{name}"), num=7)
    found = plain.places(outputs, batch, name)
    logits = plain.quantizer_logits(
        outputs.features[[p[0] for p in found]], loss.quantizer.logits.weight, loss.quantizer.logits.bias
    )
    return loss, found, logits, noise, distractors


QUANTIZER = {"num_codes": 16, "code_dim": 24, "logit_init_std": 0.5}


@pytest.fixture(
    params=[(name, ids) for name in ("masked_speech", "translation_lm") for ids in ("sampled", "likeliest")],
    ids="-".join,
)
def speech(request, build_model, detached, batch):
    name, code_ids = request.param
    model = build_model(quantizer={**QUANTIZER, "code_ids": code_ids})
    outputs = detached(model, batch)
    result = objective(model, name)(outputs)
    losses = {item.name.removeprefix(f"{name}/"): item for item in result.losses}
    return outputs, losses, speech_step(model, outputs, batch, name)


def test_contrastive(speech):
    outputs, losses, (loss, found, logits, noise, distractors) = speech
    projection, quantizer = loss.context_projection, loss.quantizer
    scores = (logits + noise).detach()
    codes = [max(range(16), key=lambda k, row=row: row[k]) for row in scores.tolist()]
    targets = quantizer.codebook[codes].detach().requires_grad_()
    contexts = torch.stack([projection.weight @ outputs.contexts[p[0]] + projection.bias for p in found])
    total, counted = plain.contrastive(contexts, targets, codes, distractors, [p[2] for p in found], 0.1)

    assert counted == losses["contrastive"].count.item() > 10
    torch.testing.assert_close(losses["contrastive"].total, total, **CLOSE)
    leaves = {
        "contexts": outputs.contexts,
        "projection": projection.weight,
        "projection bias": projection.bias,
        "features": outputs.features,
        "logits": quantizer.logits.weight,
        "codebook": quantizer.codebook,
    }
    ours = gradients(losses["contrastive"].total, leaves)
    reference = gradients(total, {k: leaves[k] for k in ("contexts", "projection", "projection bias")})
    (by_vector,) = torch.autograd.grad(total, targets)
    by_score, reference["codebook"] = plain.straight_through(scores, 2.0, quantizer.codebook.detach(), by_vector)
    reference |= gradients((logits * by_score).sum(), {k: leaves[k] for k in ("features", "logits")})
    assert_equal_gradients(ours, reference)


@pytest.mark.parametrize(("name", "seconds"), [("masked_speech", SPEECH), ("translation_lm", (1.2, 0.3, 0.9))])
def test_utterances_with_too_few_masked_frames_are_skipped_and_counted(name, seconds, build_model, make_batch):
    model = build_model()
    batch = make_batch(speech=SPEECH, pairs=[(s, 5, 7) for s in seconds] if name == "translation_lm" else PAIRS)
    outputs = model(batch)
    result = objective(model, name)(outputs)
    frames = Counter(place[2] for place in plain.places(outputs, batch, name))
    few = [i for i in range(len(seconds)) if frames[i] < 2]
    skipped = next(item for item in result.metrics if item.name == f"{name}/contrastive_skipped")
    assert 0 < len(few) < len(seconds)
    assert (skipped.total, skipped.count) == (len(few), len(seconds))
    loss = next(item for item in result.losses if item.name == f"{name}/contrastive")
    assert loss.count == sum(n for i, n in frames.items() if i not in few)


def test_codes(speech):
    outputs, losses, (loss, found, logits, noise, _) = speech
    head = loss.code_head
    scores = logits + noise if loss.quantizer.config.code_ids == "sampled" else logits
    chosen = [max(range(16), key=lambda k, row=row: row[k]) for row in scores.tolist()]
    total = sum(
        plain.cross_entropy(head.weight @ outputs.hidden[p[1]] + head.bias, code)
        for p, code in zip(found, chosen, strict=True)
    )
    assert losses["codes"].count.item() == len(found) > 10
    torch.testing.assert_close(losses["codes"].total, total, **CLOSE)
    leaves = {"hidden": outputs.hidden, "head": head.weight, "bias": head.bias}
    assert_equal_gradients(gradients(losses["codes"].total, leaves), gradients(total, leaves))
    unread = gradients(losses["codes"].total, {"features": outputs.features, "codebook": loss.quantizer.codebook})
    assert not any(gradient.any() for gradient in unread.values())  # targets are no way to lower this loss


def test_diversity(speech):
    outputs, losses, (loss, _, logits, _, _) = speech
    shares = [torch.stack([torch.exp(x - row.max()) for x in row]) for row in logits]
    value = plain.diversity([share / share.sum() for share in shares])
    assert losses["diversity"].count.item() == 1
    torch.testing.assert_close(losses["diversity"].total, value, **CLOSE)
    leaves = {"features": outputs.features, "logits": loss.quantizer.logits.weight, "bias": loss.quantizer.logits.bias}
    assert_equal_gradients(gradients(losses["diversity"].total, leaves), gradients(value, leaves))


@pytest.mark.parametrize("name", ["masked_text", "translation_lm"])
def test_masked_tokens(name, build_model, detached, batch):
    model = build_model()
    outputs = detached(model, batch)
    loss = next(item for item in objective(model, name)(outputs).losses if item.name == f"{name}/tokens")
    bias = objective(model, "masked_text").loss.bias
    embedding = model.text_encoder.embedding.weight
    texts = (batch.text if name == "masked_text" else batch.pairs).tokens.tolist()
    begins = [0]
    for length in (batch.text if name == "masked_text" else batch.pairs).lengths.tolist():
        begins.append(begins[-1] + length)
    found = plain.token_places(outputs, batch, name)
    first = {i: min(rows) for i, rows in first_rows(outputs, name).items()}
    total = 0
    for row, place, i in found:
        token = texts[begins[i] + row - first[i]]
        total = total + plain.cross_entropy(embedding[:48] @ outputs.hidden[place] + bias, token)
    assert loss.count.item() == len(found) > 0
    torch.testing.assert_close(loss.total, total, **CLOSE)
    leaves = {"hidden": outputs.hidden, "embedding": embedding, "bias": bias}
    assert_equal_gradients(gradients(loss.total, leaves), gradients(total, leaves))


def first_rows(outputs, name):
    """Rows of each text of an input in the text layout, by its number in the batch."""
    rows = outputs.packed_text.rows_of(name, 0).tolist()
    found = {}
    for i, length in enumerate(outputs.packed_text.lengths[name][:, 0].tolist()):
        found[i], rows = rows[:length], rows[length:]
    return found


@pytest.mark.parametrize("inputs", ["unmasked", "masked"])
def test_matching(inputs, build_model, detached, batch):
    model = build_model(objectives={"translation_lm": {}, "matching": {"input": inputs}})
    outputs = detached(model, batch)
    (loss,) = objective(model, "matching")(outputs).losses
    head = objective(model, "matching").head
    begins = plain.multimodal_begins(outputs, batch)
    total = sum(
        plain.matching(head.weight[0] @ outputs.hidden[begins[name, i]] + head.bias[0], label)
        for name, label in (("matching", 1), ("matching_negative", 0))
        for i in range(len(PAIRS))
    )
    assert loss.count.item() == 2 * len(PAIRS)
    torch.testing.assert_close(loss.total, total, **CLOSE)
    leaves = {"hidden": outputs.hidden, "head": head.weight, "bias": head.bias}
    assert_equal_gradients(gradients(loss.total, leaves), gradients(total, leaves))
    assert ("matching" in outputs.masked_speech) == (inputs == "masked")


def test_the_loss_to_minimise_is_the_weighted_sum_of_means(build_model, batch):
    weights = {"masked_speech": 1.0, "masked_text": 0.3, "translation_lm": 0.03, "matching": 0.05}
    terms = {"contrastive": 0.7, "codes": 0.9, "diversity": 0.1, "tokens": 1.0, "matching": 1.0}
    model = build_model(
        objectives={
            **{name: {"weight": weight} for name, weight in weights.items()},
            "translation_lm": {"weight": 0.03, "contrastive_weight": 0.4},
        },
        speech_loss={"contrastive_weight": 0.7, "prediction_weight": 0.9, "num_distractors": 7},
    )
    total, result, _ = model.losses(batch)
    expected = 0
    for loss in result.losses:
        name, _, term = loss.name.partition("/")
        own = 0.4 if loss.name == "translation_lm/contrastive" else 1.0
        expected += weights[name] * own * terms[term or name] * loss.total / loss.count
    assert len(result.losses) == 9
    torch.testing.assert_close(total, expected, **CLOSE)
