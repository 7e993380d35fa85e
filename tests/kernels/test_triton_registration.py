"""The kernels as ``torch.library`` operators: opcheck, torch.compile, autocast, the twins' bits, and long training."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from kernel_batches import KEY, convolution_inputs, examples, layout
from kernel_oracles import contrastive, convolution_middle

from slam_kernels import (
    apply_spans,
    corrupt_tokens,
    glu_conv_group_norm_silu,
    gumbel_noise,
    masked_cross_entropy,
    sample_distractors,
    sample_spans,
    span_contrastive,
)

LENGTHS = [5, 0, 9, 1]
ROWS = sum(LENGTHS)
CU = layout(LENGTHS)
IDS, EPOCHS = examples(len(LENGTHS))
MASK = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) < 0.6
INDEX = MASK.nonzero().squeeze(1)


def leaf(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def operators():
    """Every registered operator with arguments: name -> (operator, arguments)."""
    from slam_kernels.fused import (
        apply_spans as spans,
    )
    from slam_kernels.fused import corrupt_tokens as tokens
    from slam_kernels.fused import glu_conv_group_norm_silu as convolution
    from slam_kernels.fused import gumbel_noise as gumbel
    from slam_kernels.fused import masked_cross_entropy as entropy
    from slam_kernels.fused import sample_distractors as distractors
    from slam_kernels.fused import sample_spans as sampler
    from slam_kernels.fused import span_contrastive as loss

    inputs = convolution_inputs(ROWS, 8, 3)
    plain = [t.detach() for t in inputs]
    _, mean, rstd = convolution.forward_op(*plain, CU, 2, 1e-3, torch.float32)
    drawn = sample_distractors(INDEX, CU, IDS, EPOCHS, key=KEY, num=3)
    vectors = leaf(len(INDEX), 6, seed=1), leaf(len(INDEX), 6, seed=2)
    outputs = loss.forward_op(*(v.detach() for v in vectors), drawn, 0.1)
    hidden, weight, bias = leaf(ROWS, 6, seed=4), leaf(11, 6, seed=5), leaf(11, seed=6)
    classes = torch.arange(len(INDEX)) % 11
    flat = [t.detach() for t in (hidden, weight, bias)]
    lse = entropy.forward_op(flat[0], INDEX, classes, flat[1], flat[2])[2]
    packed = (CU, IDS, EPOCHS, KEY)
    x, one = leaf(ROWS, 6, seed=7), torch.tensor(1.0)
    return {
        "convolution": (convolution.forward_op, (*inputs, CU, 2, 1e-3, torch.float32)),
        "convolution without bias": (
            convolution.forward_op,
            (*inputs[:2], None, *inputs[3:], CU, 2, 1e-3, torch.float32),
        ),
        "convolution backward": (
            convolution.backward_op,
            (torch.ones(ROWS, 8), *plain, CU, mean, rstd, 2, torch.float32),
        ),
        "spans by start": (sampler.sample_spans_op, (*packed, 3, 1 << 21, False, ROWS)),
        "spans by budget": (sampler.sample_spans_op, (*packed, 3, 1 << 22, True, ROWS)),
        "apply learned": (spans.forward_op, (x, MASK, *packed, leaf(6), 0.1)),
        "apply random": (spans.forward_op, (x, MASK, *packed, None, 0.1)),
        "apply backward": (spans.backward_op, (torch.ones(ROWS, 6), MASK, True)),
        "corrupt": (tokens.corrupt_tokens_op, (torch.arange(ROWS), MASK, *packed, 99, 50, 1 << 23, 3 << 22)),
        "distractors": (distractors.sample_distractors_op, (INDEX, *packed, 3)),
        "gumbel": (gumbel.gumbel_noise_op, (INDEX, *packed, 5, torch.float32)),
        "contrastive": (loss.forward_op, (*vectors, drawn, 0.1)),
        "contrastive backward": (
            loss.backward_op,
            (one, *(v.detach() for v in vectors), drawn, *outputs[2:], 0.1),
        ),
        "cross entropy": (entropy.forward_op, (hidden, INDEX, classes, weight, bias)),
        "cross entropy backward": (entropy.backward_op, (one, flat[0], INDEX, classes, flat[1], flat[2], lse)),
    }


NAMES = [
    "convolution", "convolution without bias", "convolution backward", "spans by start", "spans by budget",
    "apply learned", "apply random", "apply backward", "corrupt", "distractors", "gumbel", "contrastive",
    "contrastive backward", "cross entropy", "cross entropy backward",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    operator, arguments = operators()[name]
    torch.library.opcheck(operator, arguments)


def test_names_are_complete():
    assert sorted(operators()) == sorted(NAMES)


def step(x, weight, projection, head, bias):
    """Every operator in one function, through a loss."""
    options = {"key": KEY, "backend": "triton"}
    mask = sample_spans(CU, IDS, EPOCHS, span=2, start_probability=0.4, num_rows=ROWS, **options)
    masked, index = apply_spans(x, mask, CU, IDS, EPOCHS, vector=None, std=0.1, **options)
    tokens, _ = corrupt_tokens(torch.arange(ROWS), mask, CU, IDS, EPOCHS, mask_id=99, vocab_size=50, **options)
    ones = torch.ones(8)
    h = glu_conv_group_norm_silu(
        masked @ projection, weight, None, ones, ones * 0, CU, num_groups=2, eps=1e-3, backend="triton"
    )
    drawn = sample_distractors(index, CU, IDS, EPOCHS, num=3, **options)
    noise = gumbel_noise(index, CU, IDS, EPOCHS, num=6, dtype=torch.float32, **options)
    rows = h.index_select(0, index)
    one, _ = span_contrastive(rows[:, :6] + noise, x.index_select(0, index), drawn, temperature=0.1, backend="triton")
    two, correct = masked_cross_entropy(h, index, tokens.index_select(0, index) % 11, head, bias, backend="triton")
    return one + two, correct


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_to_one_graph(compiler):
    inputs = leaf(ROWS, 6), leaf(8, 3, seed=1), leaf(6, 16, seed=2), leaf(11, 8, seed=3), leaf(11, seed=4)
    loss, correct = step(*inputs)
    grads = torch.autograd.grad(loss, inputs)
    torch._dynamo.reset()
    # The number of masked rows is known to the device alone: dynamo wants to be told that this may enter a graph.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled, same = torch.compile(step, fullgraph=True, backend=compiler)(*inputs)
    torch.testing.assert_close(compiled, loss)
    assert torch.equal(correct, same)
    for a, b in zip(torch.autograd.grad(compiled, inputs), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_the_same_under_activation_checkpointing():
    """Which lets a backward look at what it saved once, and no more."""
    x, weight, head, bias = leaf(ROWS, 16), leaf(8, 3, seed=1), leaf(11, 8, seed=3), leaf(11, seed=4)
    ones, classes = torch.ones(8), torch.arange(len(INDEX)) % 11

    def run(x, weight, head, bias):
        h = glu_conv_group_norm_silu(x, weight, None, ones, ones * 0, CU, num_groups=2, eps=1e-3, backend="triton")
        y, index = apply_spans(h, MASK, CU, IDS, EPOCHS, key=KEY, vector=None, std=0.1, backend="triton")
        drawn = sample_distractors(index, CU, IDS, EPOCHS, key=KEY, num=3, backend="triton")
        loss, _ = span_contrastive(
            y.index_select(0, index), h.index_select(0, index), drawn, temperature=0.1, backend="triton"
        )
        return loss + masked_cross_entropy(h, index, classes, head, bias, backend="triton")[0]

    inputs = x, weight, head, bias
    expected = torch.autograd.grad(run(*inputs), inputs)
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_convolution_compiles_for_any_number_of_rows():
    torch._dynamo.reset()
    inputs = convolution_inputs(16, 8, 3)

    def run(x, cu):
        return glu_conv_group_norm_silu(x * 2, *inputs[1:], cu, num_groups=2, eps=1e-3, backend="triton").sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([4, 5], [3, 3, 8], [16]):
        x = inputs[0][: sum(lengths)].detach()
        torch.testing.assert_close(compiled(x, layout(lengths)), run(x, layout(lengths)))


def test_autocast_leaves_the_convolution_alone():
    inputs = convolution_inputs(ROWS, 8, 3)
    options = {"num_groups": 2, "eps": 1e-3, "backend": "triton"}
    plain = glu_conv_group_norm_silu(*inputs, CU, **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = glu_conv_group_norm_silu(*inputs, CU, **options)
        low = glu_conv_group_norm_silu(inputs[0].bfloat16(), *inputs[1:], CU, **options)
        loss, _ = masked_cross_entropy(*_entropy_inputs(), backend="triton")
        twin, _ = masked_cross_entropy(*_entropy_inputs(), backend="torch")
    assert torch.equal(plain, cast)
    assert low.dtype == torch.bfloat16
    exact, _ = masked_cross_entropy(*_entropy_inputs(), backend="triton")
    # The products saw bfloat16; the twin's logits were rounded to it besides.
    assert loss.dtype == torch.float32
    assert 0 < abs(float(loss - exact)) < 0.02 * float(exact)
    assert abs(float(loss - exact)) <= 2 * abs(float(twin - exact)) + 0.01 * float(exact)


def _entropy_inputs():
    classes = torch.arange(len(INDEX)) % 11
    return leaf(ROWS, 6).detach(), INDEX, classes, leaf(11, 6, seed=1).detach(), leaf(11, seed=2).detach()


def test_bfloat16_inputs_are_only_rounded_where_they_are_stored():
    from slam_kernels.fused.glu_conv_group_norm_silu import backward_op, forward_op

    low = [t.detach().bfloat16() for t in convolution_inputs(ROWS, 8, 5)]
    wide = [t.double().requires_grad_() for t in low]
    out, mean, rstd = forward_op(*low, CU, 2, 1e-3, torch.float32)
    expected = convolution_middle(*wide, CU, 2, 1e-3)
    assert float((out.double() - expected).detach().abs().max()) < 1e-5 * float(expected.detach().abs().max())
    grad = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = backward_op(grad, *low, CU, mean, rstd, 2, torch.float32)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert float((a.double() - b).abs().max()) < 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("slices", [2, 4])
def test_slices_of_the_channels_give_the_same_bits(slices, monkeypatch):
    from dataclasses import replace

    from slam_kernels.fused import glu_conv_group_norm_silu as convolution

    original = convolution.tile
    monkeypatch.setattr(convolution, "tile", lambda *arguments: replace(original(*arguments), columns=16))
    inputs = [t.detach() for t in convolution_inputs(ROWS, 64, 3)]
    grad = torch.ones(ROWS, 64)
    results = []
    for count in (1, slices):
        out, mean, rstd = convolution.run_forward(*inputs, CU, 32, 1e-3, torch.float32, count)
        gradients = convolution.run_backward(grad, *inputs, CU, mean, rstd, 32, torch.float32, count)
        results.append((out, mean, rstd, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match="cannot be cut into 3 slices"):
        convolution.run_forward(*inputs, CU, 32, 1e-3, torch.float32, 3)


def test_bfloat16_losses_are_float32():
    vectors = [leaf(12, 16, seed=s).detach().bfloat16() for s in (1, 2)]
    drawn = torch.arange(36).view(12, 3) % 12
    loss, _ = span_contrastive(*vectors, drawn, temperature=0.1, backend="triton")
    expected, _ = contrastive(*vectors, drawn, 0.1)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    hidden, index, classes, weight, bias = _entropy_inputs()
    loss, _ = masked_cross_entropy(hidden.bfloat16(), index, classes, weight.bfloat16(), bias, backend="triton")
    logits = hidden.bfloat16().double()[index] @ weight.bfloat16().double().t() + bias.double()
    assert float(loss) == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, classes, reduction="sum")), rel=1e-5
    )


@pytest.mark.parametrize("width", [1, 6, 33, 1030])
def test_noise_has_the_bits_of_the_twins(width):
    x = leaf(ROWS, width).detach()
    results = []
    for backend in ("torch", "triton"):
        options = {"key": KEY, "backend": backend}
        rows, _ = apply_spans(x, MASK, CU, IDS, EPOCHS, vector=None, std=0.1, **options)
        noise = gumbel_noise(INDEX, CU, IDS, EPOCHS, num=width, dtype=torch.float32, **options)
        drawn = sample_distractors(INDEX, CU, IDS, EPOCHS, num=width, **options)
        results.append((rows, noise, drawn))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_twenty_steps_have_the_same_losses_as_the_twins():
    cu, ids, rows = layout([6, 5]), torch.tensor([3, 4]), 11
    third = torch.arange(rows) % 3 == 0

    def train(backend):
        embedding, projection, weight = leaf(40, 8, seed=1), leaf(8, 16, seed=2), leaf(8, 3, seed=3)
        norm, shift, head, bias = torch.ones(8).requires_grad_(), leaf(8, seed=4), leaf(40, 8, seed=5), leaf(40, seed=6)
        optimizer = torch.optim.SGD([embedding, projection, weight, norm, shift, head, bias], lr=0.01)
        losses = []
        for epoch in range(20):
            packed = cu, ids, torch.full_like(ids, epoch)
            options = {"key": KEY, "backend": backend}
            tokens = (torch.arange(rows) * 7 + epoch) % 38
            mask = sample_spans(*packed, span=2, start_probability=0.5, num_rows=rows, **options)
            corrupted, index = corrupt_tokens(tokens, mask, *packed, mask_id=39, vocab_size=38, **options)
            x = torch.nn.functional.embedding(corrupted, embedding)
            x, _ = apply_spans(x, mask & third, *packed, vector=None, std=0.1, **options)
            h = glu_conv_group_norm_silu(
                x @ projection, weight, None, norm, shift, cu, num_groups=2, eps=1e-3, backend=backend
            )
            drawn = sample_distractors(index, *packed, num=4, **options)
            noise = gumbel_noise(index, *packed, num=8, dtype=torch.float32, **options)
            aim = torch.nn.functional.embedding(tokens[index], embedding) + 0.1 * noise
            one, _ = span_contrastive(h.index_select(0, index), aim, drawn, temperature=0.5, backend=backend)
            two, _ = masked_cross_entropy(h, index, tokens[index], head, bias, backend=backend)
            loss = (one + two) / max(index.numel(), 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return torch.tensor(losses)

    ours, theirs = train("triton"), train("torch")
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)
    assert float(ours.std()) > 0.1
