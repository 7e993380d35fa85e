"""CTC on paired speech: the sum over all alignments, written out; pairs that are too short are left out."""

import itertools

import plain_losses as plain
import pytest
import sentencepiece
import torch

INPUTS = {
    "translation_lm": {"translation_lm": {}, "ctc": {"weight": 0.2}},
    "speech": {"ctc": {"weight": 0.2, "input": "speech"}},
    "masked speech": {
        "matching": {},
        "ctc": {"weight": 0.2, "input": "speech", "speech_masking": {"start_probability": 0.1}},
    },
}
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def collapse(path, blank):
    """An alignment's text: repetitions merged, then blanks removed (Graves et al., 2006, section 3.1)."""
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]


def all_alignments(logits, text, blank):
    """-log of the summed probability of every alignment of the text: for a handful of frames."""
    symbols = sorted({blank, *text})
    shares = [torch.exp(row) / torch.exp(row).sum() for row in logits]
    total = 0
    for path in itertools.product(symbols, repeat=len(logits)):
        if collapse(path, blank) == text:
            product = torch.ones((), dtype=logits.dtype)
            for share, symbol in zip(shares, path, strict=True):
                product = product * share[symbol]
            total = total + product
    return -torch.log(total)


def forward_variables(logits, text, blank):
    """The same sum by the forward recursion (section 4.1), in log space, for longer inputs."""
    logs = [row - torch.logsumexp(row, 0) for row in logits]
    symbols = [blank, *itertools.chain(*((token, blank) for token in text))]
    never = torch.tensor(-1e30, dtype=logits.dtype)
    alpha = [logs[0][s] if i < 2 else never for i, s in enumerate(symbols)]
    for row in logs[1:]:
        before = alpha
        alpha = []
        for i, s in enumerate(symbols):
            ways = [before[i], *([before[i - 1]] if i else [])]
            if i > 1 and s not in (blank, symbols[i - 2]):
                ways.append(before[i - 2])
            alpha.append(torch.logsumexp(torch.stack(ways), 0) + row[s])
    return -torch.logsumexp(torch.stack(alpha[-2:]), 0)


def test_the_two_references_agree():
    logits = torch.randn(5, 4, dtype=torch.float64)
    for text in ([0], [1, 2], [1, 1], [2, 0, 2]):
        torch.testing.assert_close(forward_variables(logits, text, 3), all_alignments(logits, text, 3), **CLOSE)


@pytest.fixture(params=INPUTS)
def step(request, build_model, detached):
    def build(batch):
        model = build_model(objectives=INPUTS[request.param])
        outputs = detached(model, batch)
        ctc = model.objectives["ctc"]
        return model, outputs, ctc, ctc(outputs)

    return build


def speech_positions(outputs, batch, i):
    source = "translation_lm" if "translation_lm" in outputs.multimodal else "ctc"
    begin = plain.multimodal_begins(outputs, batch)[source, i] + (source == "translation_lm")  # after its CLS
    return slice(begin, begin + -(-int(batch.pairs.audio_lengths[i]) // 160 // 4))


def speech_rows(outputs, batch, i):
    return outputs.hidden[speech_positions(outputs, batch, i)]


def test_values_and_gradients(step, make_batch):
    batch = make_batch(pairs=((1.2, 5, 7), (0.4, 3, 3), (1.5, 8, 9)))
    batch.pairs.tokens[1] = batch.pairs.tokens[0]  # a repetition, which needs a blank between
    _, outputs, ctc, result = step(batch)
    texts = [text.tolist() for text in batch.pairs.tokens.split(batch.pairs.lengths.tolist())]
    total = sum(
        forward_variables(speech_rows(outputs, batch, i) @ ctc.head.weight.T + ctc.head.bias, text, blank=48)
        for i, text in enumerate(texts)
    )
    (loss,) = result.losses
    assert (loss.name, loss.count.item(), loss.weight) == ("ctc", 16, 0.2)
    torch.testing.assert_close(loss.total, total, **CLOSE)
    for leaf in (outputs.hidden, ctc.head.weight, ctc.head.bias):
        ours, reference = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss.total, total))
        torch.testing.assert_close(ours, reference, **CLOSE)


@pytest.mark.parametrize(
    ("tokens", "kept"), [(range(10), True), ([5] * 5 + [6], True), ([5] * 6, False), (range(11), False)]
)
def test_a_pair_with_too_few_frames_is_skipped_and_counted(step, make_batch, tokens, kept):
    """Ten frames hold ten different tokens, or five equal ones (four blanks between) and another, no six equal ones."""
    tokens = torch.tensor([*tokens])
    batch = make_batch(pairs=((0.4, len(tokens), 4), (1.2, 3, 3)))
    batch.pairs.tokens[: len(tokens)] = tokens
    _, outputs, ctc, result = step(batch)
    (loss,), (skipped,) = result.losses, result.metrics
    assert (skipped.total.item(), skipped.count.item()) == (0 if kept else 1, 2)
    assert loss.count == 3 + (len(tokens) if kept else 0)
    other = forward_variables(
        speech_rows(outputs, batch, 1) @ ctc.head.weight.T + ctc.head.bias, batch.pairs.tokens[-3:].tolist(), blank=48
    )
    assert torch.isfinite(loss.total)
    assert (loss.total > other + 1) == kept
    (gradient,) = torch.autograd.grad(loss.total, outputs.hidden)
    assert torch.isfinite(gradient).all()
    assert gradient[speech_positions(outputs, batch, 0)].any() == kept


@pytest.mark.parametrize("pairs", [(), ((0.2, 20, 4),)], ids=["no pair", "all too short"])
def test_a_count_of_zero_is_no_error(step, make_batch, pairs):
    model, _, _, result = step(make_batch(speech=(), text=(), pairs=pairs))
    assert result.losses[0].count == 0
    assert result.losses[0].total == 0
    total, _, _ = model.losses(make_batch(speech=(), text=(), pairs=pairs))
    total.backward()
    assert torch.isfinite(total)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_characters(build_model, detached, make_batch):
    """The alignments of the text letter by letter; what has no letters stays one symbol."""
    model = build_model(objectives={"ctc": {"weight": 0.2, "input": "speech", "units": "characters"}})
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model.tokenizer_model))
    batch = make_batch(pairs=((1.6, 5, 7), (0.4, 6, 3), (2.0, 8, 9)))
    batch.pairs.tokens %= tokenizer.get_piece_size()
    batch.pairs.tokens[0] = tokenizer.unk_id()
    outputs = detached(model, batch)
    ctc = model.objectives["ctc"]
    result = ctc(outputs)
    whole = {"<unk>", "<s>", "</s>"}
    pieces = {tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())}
    alphabet = {letter: i for i, letter in enumerate(sorted((pieces & whole) | set("".join(pieces - whole))))}
    assert ctc.head.out_features == len(alphabet) + 1
    total, symbols, skipped = 0, 0, 0
    for i, text in enumerate(batch.pairs.tokens.split(batch.pairs.lengths.tolist())):
        spelt = [
            alphabet[letter]
            for piece in map(tokenizer.id_to_piece, text.tolist())
            for letter in ([piece] if piece in whole else piece)
        ]
        rows = speech_rows(outputs, batch, i)
        if len(rows) < len(spelt) + sum(a == b for a, b in itertools.pairwise(spelt)):
            skipped += 1
            continue
        total = total + forward_variables(rows @ ctc.head.weight.T + ctc.head.bias, spelt, blank=len(alphabet))
        symbols += len(spelt)
    (loss,), (metric,) = result.losses, result.metrics
    assert (loss.count.item(), metric.total.item()) == (symbols, skipped)
    assert symbols > 5
    torch.testing.assert_close(loss.total, total, **CLOSE)


def test_what_cannot_be(model_config):
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    def refused(match, **objectives):
        with pytest.raises(ValueError, match=match):
            SLAMPretrainingModel(model_config(objectives=objectives))

    wanting = (
        r"model\.objectives: ctc reads the speech of translation_lm's pairs: enable that too, or set ctc\.input=speech"
    )
    refused(wanting, masked_speech={}, ctc={})
    refused(r"matching\.input=masked takes its masking from translation_lm", matching={"input": "masked"})
    refused(r"input: 'text' is not one of translation_lm, speech", translation_lm={}, ctc={"input": "text"})
    refused(r"units: 'words' is not one of pieces, characters", translation_lm={}, ctc={"units": "words"})
    masking = {"start_probability": 0.1}
    refused(r"speech_masking is of input=speech alone", translation_lm={}, ctc={"speech_masking": masking})
