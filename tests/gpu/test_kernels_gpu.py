"""The Triton kernels on a GPU: what the interpreter cannot show. ``pytest -m gpu tests/gpu/test_kernels_gpu.py``.

Tolerances: float32 within 1e-5 of the largest value of a float64 computation; in lower precision at most twice the
error that PyTorch's own operators make in that precision, plus a little. Names begin with the operator: the benchmark
prints no speed-up for an operator one of whose tests fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
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
    triton_unavailable,
)

_REASON = triton_unavailable("cuda") if torch.cuda.is_available() else "no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"Triton kernels cannot run: {_REASON}")]

LENGTHS = [700, 0, 1, 4, 333, 64, 65, 1200, 17]
ROWS = sum(LENGTHS)


@pytest.fixture(autouse=True)
def _exact_and_poisoned(monkeypatch):
    """Float32 products in float32, and NaN in memory that a kernel leaves unwritten."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def within(ours: torch.Tensor, exact: torch.Tensor, stock: torch.Tensor | None, name: str) -> None:
    """Float32: 1e-5 of the maximum. Lower precision: twice the error of ``stock``, plus 1e-5 of the maximum."""
    exact = exact.detach().double().cpu()
    error = float((ours.detach().double().cpu() - exact).abs().max())
    limit = 1e-5 * max(float(exact.abs().max()), 0.1)
    if stock is not None:
        limit += 2 * float((stock.detach().double().cpu() - exact).abs().max())
    assert error <= limit, f"{name}: error {error:.3e}, allowed {limit:.3e}"


def stock_middle(x, conv_weight, conv_bias, norm_weight, norm_bias, lengths, groups):
    """PyTorch's own operators in x's dtype, a sequence at a time."""
    up = [t.to(x.dtype) for t in (conv_weight, conv_bias, norm_weight, norm_bias)]
    pieces = []
    for piece in x.split(lengths):
        if piece.shape[0]:
            h = F.glu(piece, dim=-1).t().unsqueeze(0)
            h = F.conv1d(h, up[0].unsqueeze(1), up[1], padding=conv_weight.shape[1] // 2, groups=h.shape[1])
            pieces.append(F.silu(F.group_norm(h, groups, up[2], up[3], 1e-3)).squeeze(0).t())
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "groups", "taps"), [(1024, 32, 5), (144, 8, 31), (320, 32, 5), (96, 12, 15)])
def test_glu_conv_group_norm_silu_accuracy(channels, groups, taps, dtype):
    inputs = convolution_inputs(ROWS, channels, taps, dtype=dtype)
    grad = torch.randn(ROWS, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = convolution_middle(*exact_inputs, layout(LENGTHS), groups, 1e-3)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())
    device = [t.detach().cuda().requires_grad_() for t in inputs]
    out = glu_conv_group_norm_silu(*device, layout(LENGTHS).cuda(), num_groups=groups, eps=1e-3, backend="triton")
    grads = torch.autograd.grad(out, device, grad.cuda())
    stock, stock_grads = None, [None] * len(device)
    if dtype != torch.float32:
        stock = stock_middle(*device, LENGTHS, groups)
        stock_grads = torch.autograd.grad(stock, device, grad.cuda())
    within(out, exact, stock, "output")
    for i, name in enumerate(("x", "conv_weight", "conv_bias", "norm_weight", "norm_bias")):
        within(grads[i], exact_grads[i], stock_grads[i], name)


def test_glu_conv_group_norm_silu_is_deterministic_and_keeps_to_itself():
    inputs = [t.detach().cuda().requires_grad_() for t in convolution_inputs(ROWS, 256, 5, dtype=torch.bfloat16)]
    cu = layout(LENGTHS).cuda()

    def run(x):
        out = glu_conv_group_norm_silu(x, *inputs[1:], cu, num_groups=32, eps=1e-3, backend="triton")
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *inputs[1:]])]

    first = run(inputs[0])
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(inputs[0]), strict=True))
    poisoned = inputs[0].detach().clone()
    poisoned[:700] = float("nan")
    out, dx, *_ = run(poisoned.requires_grad_())
    assert torch.equal(out[700:], first[0][700:])
    assert torch.equal(dx[700:], first[1][700:])


def test_glu_conv_group_norm_silu_compiles():
    inputs = [t.detach().cuda().requires_grad_() for t in convolution_inputs(ROWS, 64, 5)]
    cu = layout(LENGTHS).cuda()

    def run(x):
        return glu_conv_group_norm_silu(x * 2, *inputs[1:], cu, num_groups=8, eps=1e-3, backend="triton").sin()

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(inputs[0]), run(inputs[0]))


def test_glu_conv_group_norm_silu_beyond_2_31_elements():
    free, _ = torch.cuda.mem_get_info()
    rows, channels = 300_000, 4096
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free GPU memory, {free / 2**30:.0f} GiB are free")
    x = torch.zeros(rows, 2 * channels, dtype=torch.bfloat16, device="cuda")
    x[-100:] = torch.randn(100, 2 * channels, device="cuda")
    small = [t.detach().cuda() for t in convolution_inputs(1, channels, 5)[1:]]
    cu = torch.tensor([0, rows - 100, rows], dtype=torch.int32, device="cuda")
    out = glu_conv_group_norm_silu(x, *small, cu, num_groups=32, eps=1e-3, backend="triton")
    alone = glu_conv_group_norm_silu(x[-100:], *small, layout([100]).cuda(), num_groups=32, eps=1e-3, backend="triton")
    assert torch.equal(out[-100:], alone)


def packed(lengths=LENGTHS):
    ids, epochs = examples(len(lengths))
    return layout(lengths), ids, epochs


def on_both(function, *tensors):
    """Results of the twin on the CPU and of the kernel on the GPU, both on the CPU."""
    twin = function("torch", *tensors)
    kernel = function("triton", *(t.cuda() for t in tensors))
    pairs = zip(twin, kernel, strict=True) if isinstance(twin, tuple) else [(twin, kernel)]
    return [(a, b.cpu()) for a, b in pairs]


@pytest.mark.parametrize("options", [{"start_probability": 0.065}, {"rate": 0.15}, {"rate": 1.0}, {"rate": 0.5}])
@pytest.mark.parametrize("span", [1, 5, 10])
def test_sample_spans_has_the_bits_of_the_cpu(span, options):
    def run(backend, cu, ids, epochs):
        return sample_spans(cu, ids, epochs, key=KEY, span=span, num_rows=ROWS, backend=backend, **options)

    assert all(torch.equal(a, b) for a, b in on_both(run, *packed()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_spans_has_the_bits_of_the_cpu(dtype):
    x, mask = torch.randn(ROWS, 1024).to(dtype), torch.rand(ROWS) < 0.49

    def run(backend, x, mask, cu, ids, epochs):
        return apply_spans(x, mask, cu, ids, epochs, key=KEY, vector=None, std=0.1, backend=backend)

    assert all(torch.equal(a, b) for a, b in on_both(run, x, mask, *packed()))


def test_apply_spans_gradients():
    mask = torch.rand(ROWS) < 0.49
    x, vector = torch.randn(ROWS, 1024), torch.randn(1024)
    results = []
    for backend, device in (("torch", "cpu"), ("triton", "cuda")):
        a, v = (t.to(device).requires_grad_() for t in (x.clone(), vector.clone()))
        arguments = [t.to(device) for t in packed()]
        y, _ = apply_spans(a, mask.to(device), *arguments, key=KEY, vector=v, std=0.1, backend=backend)
        results.append([t.cpu() for t in torch.autograd.grad(y.square().sum(), (a, v))])
    assert torch.equal(results[0][0], results[1][0])
    within(results[1][1], results[0][1], None, "vector")


def test_corrupt_tokens_has_the_bits_of_the_cpu():
    tokens, mask = torch.randint(0, 32_000, (ROWS,)), torch.rand(ROWS) < 0.5

    def run(backend, tokens, mask, cu, ids, epochs):
        return corrupt_tokens(tokens, mask, cu, ids, epochs, key=KEY, mask_id=4, vocab_size=32_000, backend=backend)

    assert all(torch.equal(a, b) for a, b in on_both(run, tokens, mask, *packed()))


def test_sample_distractors_has_the_bits_of_the_cpu():
    index = (torch.rand(ROWS) < 0.49).nonzero().squeeze(1)

    def run(backend, index, cu, ids, epochs):
        return sample_distractors(index, cu, ids, epochs, key=KEY, num=100, backend=backend)

    assert all(torch.equal(a, b) for a, b in on_both(run, index, *packed()))


def test_gumbel_noise_has_the_bits_of_the_cpu():
    index = (torch.rand(ROWS) < 0.49).nonzero().squeeze(1)

    def run(backend, index, cu, ids, epochs):
        return gumbel_noise(index, cu, ids, epochs, key=KEY, num=1024, dtype=torch.float32, backend=backend)

    assert all(torch.equal(a, b) for a, b in on_both(run, index, *packed()))


def vectors(rows, width, dtype, num=100):
    g = torch.Generator().manual_seed(0)
    targets = torch.randn(rows, width, generator=g)
    contexts = (targets * 0.5 + torch.randn(rows, width, generator=g)).to(dtype)
    drawn = torch.randint(0, rows - 1, (rows, num), generator=g)
    drawn += drawn >= torch.arange(rows)[:, None]
    drawn[: rows // 8] = -1
    return contexts, targets.to(dtype), drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 1024])
def test_span_contrastive_accuracy(width, dtype):
    contexts, targets, drawn = vectors(300, width, dtype)
    wide = [t.double().requires_grad_() for t in (contexts, targets)]
    exact, right = contrastive(*wide, drawn, 0.1)
    exact_grads = torch.autograd.grad(exact, wide)
    device = [t.cuda().requires_grad_() for t in (contexts, targets)]
    loss, correct = span_contrastive(*device, drawn.cuda(), temperature=0.1, backend="triton")
    grads = torch.autograd.grad(loss, device)
    again = torch.autograd.grad(span_contrastive(*device, drawn.cuda(), temperature=0.1, backend="triton")[0], device)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    assert torch.equal(correct.cpu(), right)
    for a, b in zip(grads, exact_grads, strict=True):
        # In lower precision the arithmetic is float32: only the result is rounded.
        within(a, b, None if dtype == torch.float32 else b.to(dtype), "gradient")


def test_span_contrastive_memory_at_full_size():
    contexts, targets, drawn = (t.cuda() for t in vectors(16_384, 1024, torch.bfloat16))
    contexts.requires_grad_()
    targets.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = span_contrastive(contexts, targets, drawn, temperature=0.1, backend="triton")
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1024, 32_000])
def test_masked_cross_entropy_accuracy(vocab, dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(900, 256, generator=g), torch.randn(vocab, 256, generator=g) * 0.1
    bias, targets = torch.randn(vocab, generator=g), torch.randint(0, vocab, (400,), generator=g)
    index = torch.randperm(900, generator=g)[:400].sort().values
    low = [t.to(dtype) for t in (hidden, weight, bias)]
    wide = [t.double().requires_grad_() for t in low]
    exact = F.cross_entropy(F.linear(wide[0][index], wide[1], wide[2]), targets, reduction="sum")
    exact_grads = torch.autograd.grad(exact, wide)
    device = [t.cuda().requires_grad_() for t in low]
    h, w, b = device
    loss, _ = masked_cross_entropy(h, index.cuda(), targets.cuda(), w, b, backend="triton")
    grads = torch.autograd.grad(loss, device)
    stock_grads = [None] * 3
    if dtype != torch.float32:
        stock = F.cross_entropy(F.linear(h[index.cuda()], w, b).float(), targets.cuda(), reduction="sum")
        stock_grads = torch.autograd.grad(stock, device)
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    for a, b, stock in zip(grads, exact_grads, stock_grads, strict=True):
        within(a, b, stock, "gradient")


def test_masked_cross_entropy_holds_no_logits():
    vocab, rows = 32_000, 16_384
    hidden = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index, targets = torch.arange(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = masked_cross_entropy(hidden, index, targets, weight, None, backend="triton")
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < rows * vocab * 2  # the logits alone, in bfloat16
