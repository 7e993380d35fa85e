"""Every backend against attention written out, and which of them a config means on a machine."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import te_stand_in
import torch
from attention_oracle import attention, rotated

from nemo_slam.modules import attention_backends, fp8
from nemo_slam.modules.attention import PackedSelfAttention
from nemo_slam.modules.attention_backends import AttentionSettings, attended_positions, resolve_backend, sdpa, varlen
from nemo_slam.modules.attention_te import TransformerEngineAttention
from nemo_slam.packing import SequenceLayout
from slam_kernels import BackendError

LENGTHS = [1, 64, 65, 7, 0, 130, 8, 8]
CPU = torch.device("cpu")


@pytest.fixture
def packed():
    """(layout, qkv) in float64."""
    layout = SequenceLayout.build(np.array(LENGTHS), multiple=16)
    generator = torch.Generator().manual_seed(0)
    shape = (layout.num_rows, 3, 2, 4)
    return layout, torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)


def packed_by_sequence(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    """What varlen_attn is documented to compute."""
    assert query.dim() == 3
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert int(cu_seq_q[-1]) == len(query)  # the tail too: its rows would stay unwritten
    assert max_q == max_k == max(lengths)
    return attention(torch.stack([query, key, value], dim=1), lengths)


def run(name, layout, qkv, monkeypatch):
    if name == "sdpa":
        return sdpa(qkv, layout, 0.0)
    if name == "varlen":
        monkeypatch.setattr(attention_backends, "_packed_attention", lambda: packed_by_sequence)
        return varlen(qkv, layout, 0.0)
    return TransformerEngineAttention(2, 4, 0.0).attend(qkv, layout, True)


@pytest.mark.parametrize("name", ["sdpa", "varlen", "te"])
def test_backend_equals_attention_written_out(name, packed, monkeypatch, transformer_engine):
    layout, qkv = packed
    out = run(name, layout, qkv, monkeypatch)
    expected = attention(qkv, LENGTHS)
    assert out.shape == (layout.num_rows, 2, 4)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[: layout.num_valid], expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(expected)
    (ours,) = torch.autograd.grad((out[: layout.num_valid] * weight).sum(), qkv)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), qkv)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sdpa", "varlen", "te"])
def test_positions_that_are_told_are_those_that_are_computed(name, packed, monkeypatch, transformer_engine):
    """What ``padding_share`` counts, with what the kernels are handed."""
    layout, qkv = packed
    computed = []

    def count(query, key, value, **options):
        computed.append(query.shape[0] * query.shape[2])
        return query

    with monkeypatch.context() as patch:
        if name == "sdpa":
            patch.setattr(attention_backends.F, "scaled_dot_product_attention", count)
        run(name, layout, qkv, patch)
    if name == "varlen":
        computed = [len(qkv)]
    elif name == "te":
        computed = [size * width for kind, (size, width, *_) in transformer_engine.calls if kind == "attention"]
    assert attended_positions(name, layout) == sum(computed) >= sum(LENGTHS)
    empty = SequenceLayout.build(np.zeros(0, np.int64))
    assert attended_positions(name, empty) == (1 if name == "varlen" else 0)


@pytest.mark.parametrize("name", ["sdpa", "varlen", "te"])
def test_batch_without_sequences_stays_in_the_graph(name, monkeypatch, transformer_engine):
    layout = SequenceLayout.build(np.zeros(0, np.int64), multiple=16)
    qkv = torch.randn(16, 3, 2, 4, requires_grad=True)
    out = run(name, layout, qkv, monkeypatch)
    out[:0].sum().backward()
    assert qkv.grad is not None
    assert (qkv.grad == 0).all()


def test_rotary_turns_queries_and_keys_by_their_place_in_the_sequence(packed):
    layout, _ = packed
    torch.manual_seed(0)
    module = PackedSelfAttention(8, 2, rotary=True).double()
    rows = torch.randn(layout.num_rows, 8, dtype=torch.float64)
    out = module(rows[None], rows[None], rows[None], layout)[0, : layout.num_valid]
    start, expected = 0, []
    for length in LENGTHS:
        own = rows[start : start + length]
        q, k, v = (linear(own).unflatten(-1, (2, 4)) for linear in (module.linear_q, module.linear_k, module.linear_v))
        if length:
            part = attention(torch.stack([rotated(q), rotated(k), v], dim=1), [length])
            expected.append(module.linear_out(part.flatten(1)))
        start += length
    torch.testing.assert_close(out, torch.cat(expected), rtol=0, atol=1e-6)  # angles are float32


def test_rotary_wants_an_even_head_size():
    with pytest.raises(ValueError, match="even head size"):
        PackedSelfAttention(9, 3, rotary=True)


def test_dropout_is_applied_in_training_alone(packed):
    layout, _ = packed
    module = PackedSelfAttention(8, 2, dropout=0.5)
    rows = torch.randn(1, layout.num_rows, 8)
    assert not torch.equal(module(rows, rows, rows, layout), module(rows, rows, rows, layout))
    module.eval()
    assert torch.equal(module(rows, rows, rows, layout), module(rows, rows, rows, layout))


# ---- choice --------------------------------------------------------------------------------------


def resolve(device, dtype=torch.bfloat16, **settings):
    return resolve_backend(AttentionSettings(**settings), device, dtype)


def test_auto_on_a_cpu():
    assert resolve(CPU) == resolve(CPU, torch.float32) == "sdpa"
    assert PackedSelfAttention(8, 2).backend == "sdpa"


@pytest.mark.parametrize(
    ("capability", "dtype", "settings", "expected"),
    [
        ((9, 0), torch.bfloat16, {}, "varlen"),
        ((8, 0), torch.float16, {}, "varlen"),
        ((9, 0), torch.float32, {}, "sdpa"),
        ((7, 5), torch.float16, {}, "sdpa"),
        ((9, 0), torch.bfloat16, {"head_size": 36}, "sdpa"),
        ((9, 0), torch.bfloat16, {"head_size": 512}, "sdpa"),
        ((9, 0), torch.bfloat16, {"dropout": 0.1}, "sdpa"),
        ((9, 0), torch.bfloat16, {"choice": "sdpa"}, "sdpa"),
        ((9, 0), torch.bfloat16, {"fp8": "gemm"}, "varlen"),
    ],
)
def test_auto_on_a_gpu(pretend_gpu, capability, dtype, settings, expected):
    assert resolve(pretend_gpu(capability), dtype, **settings) == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "settings", "message"),
    [
        (None, torch.bfloat16, {"choice": "varlen"}, "attention=varlen on cpu: .*CUDA devices"),
        ((9, 0), torch.float32, {"choice": "varlen"}, "float32.*bf16-mixed"),
        ((7, 5), torch.float16, {"choice": "varlen"}, r"compute capability 7\.5"),
        ((9, 0), torch.bfloat16, {"choice": "varlen", "head_size": 36}, "multiple of 8"),
        ((9, 0), torch.bfloat16, {"choice": "varlen", "dropout": 0.1}, r"dropout_att is 0\.1"),
        (None, torch.bfloat16, {"choice": "te"}, "attention=te on cpu: Transformer Engine needs an NVIDIA GPU"),
        (None, torch.bfloat16, {"fp8": "attention"}, "fp8=attention on cpu: Transformer Engine needs"),
        ((9, 0), torch.bfloat16, {"choice": "te"}, "attention=te on cuda:0: Transformer Engine is not installed"),
        ((9, 0), torch.bfloat16, {"fp8": "attention"}, "Transformer Engine is not installed"),
    ],
)
def test_an_explicit_choice_that_cannot_be_had_is_an_error(pretend_gpu, capability, dtype, settings, message):
    device = pretend_gpu(capability) if capability else CPU
    with pytest.raises(BackendError, match=message):
        resolve(device, dtype, **settings)


def test_packed_attention_that_is_missing(pretend_gpu, monkeypatch):
    device = pretend_gpu((9, 0))
    monkeypatch.setattr(attention_backends.importlib.util, "find_spec", lambda name: None)
    assert resolve(device) == "sdpa"
    with pytest.raises(BackendError, match=r"this torch has no torch\.nn\.attention\.varlen"):
        resolve(device, choice="varlen")


def test_this_torch_has_packed_attention_with_the_arguments_that_are_passed():
    import inspect

    attention_backends._packed_attention.cache_clear()
    function = attention_backends._packed_attention()
    positional = list(inspect.signature(function).parameters)[:7]
    assert positional == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.fixture
def installed(monkeypatch, pretend_gpu):
    """The stand-in as an installed package, with the checks of the machine in place."""
    for name, module in te_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("NVTE_FP8_DPA_BWD", "NVTE_FUSED_ATTN", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NVTE_DPA_FP8_RECIPE"):
        monkeypatch.delenv(name, raising=False)
    return pretend_gpu


def test_fp8_where_it_can_be_had(installed):
    assert resolve(installed((9, 0)), fp8="attention") == "te"
    assert resolve(installed((9, 0)), choice="te") == "te"
    assert resolve(installed((8, 0)), choice="te") == "te"
    assert fp8.unavailable("gemm", installed((8, 9))) is None


@pytest.mark.parametrize(
    ("mode", "capability", "message"),
    [
        ("gemm", (8, 0), r"gemm needs compute capability 8\.9 \(Ada\), this GPU has 8\.0"),
        ("attention", (8, 0), r"attention needs compute capability 9\.0 \(Hopper\), this GPU has 8\.0"),
        ("attention", (8, 9), r"attention needs compute capability 9\.0 \(Hopper\), this GPU has 8\.9"),
    ],
)
def test_fp8_on_a_gpu_without_it(installed, mode, capability, message):
    device = installed(capability)
    with pytest.raises(BackendError, match=f"fp8={mode} on cuda:0: .*{message}"):
        fp8.require(mode, device)
    with pytest.raises(BackendError, match=message), fp8.region(mode, device):
        pass


def test_transformer_engine_says_no(installed, monkeypatch):
    device = installed((9, 0))
    engine = sys.modules["transformer_engine.pytorch"]
    monkeypatch.setattr(engine, "is_fp8_available", lambda return_reason: (False, "cuBLAS is too old"))
    with pytest.raises(BackendError, match="cuBLAS is too old"):
        fp8.require("gemm", device)


def test_fp8_attention_in_deterministic_mode(installed):
    device = installed((9, 0))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(BackendError, match="no deterministic backward"):
            resolve(device, fp8="attention")
        assert fp8.unavailable("gemm", device) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NVTE_FP8_DPA_BWD", "0"),
        ("NVTE_FUSED_ATTN", "0"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0"),
        ("NVTE_DPA_FP8_RECIPE", "F16"),
    ],
)
def test_an_environment_that_would_switch_fp8_attention_off(installed, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=name):
        resolve(installed((9, 0)), fp8="attention")


def test_transformer_engine_that_does_not_import(installed, monkeypatch):
    device = installed((9, 0))
    monkeypatch.setattr(fp8.importlib, "import_module", lambda name: (_ for _ in ()).throw(OSError("libcublas.so.13")))
    with pytest.raises(BackendError, match=r"cannot be imported: OSError: libcublas\.so\.13"):
        resolve(device, choice="te")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice": "flash"}, "attention: 'flash' is not one of auto, sdpa, varlen, te"),
        ({"fp8": "all"}, "fp8: 'all' is not one of none, gemm, attention"),
        ({"fp8": "attention", "head_size": 64}, "heads of size 128 .* not 64"),
        ({"fp8": "attention", "dropout": 0.1}, r"dropout_att 0, not 0\.1"),
        ({"fp8": "attention", "choice": "varlen"}, "attention is 'varlen': use auto or te"),
    ],
)
def test_settings_that_no_machine_has(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionSettings(**settings)
