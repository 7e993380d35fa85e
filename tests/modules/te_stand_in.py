"""A stand-in for Transformer Engine 2.12 on a CPU: its interface, its extra state, its rules; float32 for FP8.

Signatures and rules are those of the released wheel; ``tests/gpu/test_transformer_engine_gpu.py`` compares them with
the package that is installed there.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"
    scaling_factor_compute_algo: Any = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


class State:
    """What TE keeps globally."""

    recipe: DelayedScaling | None = None
    entered = 0
    recomputing = False
    checkpoints = 0
    calls: list[tuple[str, Any]] = []  # noqa: RUF012


@contextlib.contextmanager
def autocast(
    enabled: bool = True, calibrating: bool = False, recipe: Any = None, amax_reduction_group: Any = None, _graph=False
):
    State.entered += 1
    before, State.recipe = State.recipe, recipe if enabled else None
    try:
        yield
    finally:
        State.recipe = before


def is_fp8_available(return_reason: bool = False):
    return (True, "") if return_reason else True


def checkpoint(function, *args, **kwargs):
    """As TE's: modules of its own are looked for among a module's children, and without any torch's is used."""
    reentrant = kwargs.pop("use_reentrant", True)
    if isinstance(function, nn.Module):
        assert any(isinstance(m, BaseModule) for m in function.modules()), "TE would use torch's checkpointing"
    State.checkpoints += 1
    recipe = State.recipe

    def run(*inputs):
        with autocast(enabled=recipe is not None, recipe=recipe):
            return function(*inputs, **kwargs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=reentrant)


class BaseModule(nn.Module):
    """Adds ``_extra_state``: an empty tensor before FP8 ran, a pickle after."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def prepare(self) -> None:
        if State.recipe is not None:
            self.fp8_meta["fp8_checkpoint"] = True
            self.fp8_meta["recipe"] = State.recipe
            self.fp8_meta["steps"] = self.fp8_meta.get("steps", 0) + 1

    def get_extra_state(self) -> Tensor:
        if not self.fp8_meta["fp8_checkpoint"]:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps({"steps": self.fp8_meta["steps"]})), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel():
            self.fp8_meta.update(pickle.loads(state.numpy().tobytes()), fp8_checkpoint=True)


class Linear(BaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        self.weight_names, self.bias_names = ["weight"], ["bias"]
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=params_dtype)) if bias else None
        if device != "meta":
            nn.init.normal_(self.weight, std=0.02)
            nn.init.zeros_(self.bias)

    def forward(self, inp: Tensor, is_first_microbatch=None, fp8_output=False, fp8_grad=False) -> Tensor:
        self.prepare()
        if State.recipe is not None and (inp.shape[:-1].numel() % 8 or inp.shape[-1] % 16):
            raise AssertionError(f"FP8 execution requires the product of all dimensions: {tuple(inp.shape)}")
        State.calls.append(("linear", State.recipe is not None))
        weight, bias = (getattr(self, names[0]) for names in (self.weight_names, self.bias_names))
        assert isinstance(weight, Tensor)
        assert weight.device.type != "meta"
        return F.linear(inp, weight, bias)


class DotProductAttention(BaseModule):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
    ) -> None:
        super().__init__()
        self.heads, self.size = num_attention_heads, kv_channels
        self.attention_dropout, self.qkv_format, self.attn_mask_type = attention_dropout, qkv_format, attn_mask_type

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> Tensor:
        self.prepare()
        State.calls.append(("attention", tuple(query_layer.shape)))
        assert self.qkv_format == "bshd"
        assert self.attn_mask_type == "padding"
        assert attention_mask is None
        assert all(x.dim() == 4 and x.is_contiguous() for x in (query_layer, key_layer, value_layer))
        batch, width, heads, size = query_layer.shape
        assert (heads, size, max_seqlen_q, max_seqlen_kv) == (self.heads, self.size, width, width)
        assert cu_seqlens_q is not None
        assert cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q.shape == (batch + 1,)
        if State.recipe is not None and State.recipe.fp8_dpa:
            assert width % 16 == 0
        lengths = cu_seqlens_kv.diff()
        keys = torch.arange(width) < lengths[:, None]
        scores = torch.einsum("bqhd,bkhd->bhqk", query_layer, key_layer) / math.sqrt(size)
        weights = scores.masked_fill(~keys[:, None, None], -math.inf).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, value_layer)
        # What padding holds is anyone's guess.
        return out.masked_fill(~keys[:, :, None, None], math.nan).reshape(batch, width, heads * size)


def modules() -> dict[str, ModuleType]:
    """What ``sys.modules`` gets."""
    names = ("", ".pytorch", ".common", ".common.recipe", ".pytorch.attention")
    names += (".pytorch.attention.dot_product_attention",)
    found = {f"transformer_engine{name}": ModuleType(f"transformer_engine{name}") for name in names}
    for module in found.values():
        module.__spec__ = __spec__
        module.__path__ = []  # type: ignore[attr-defined]
    engine = found["transformer_engine.pytorch"]
    for thing in (Linear, DotProductAttention, autocast, checkpoint, is_fp8_available):
        setattr(engine, thing.__name__, thing)
    found["transformer_engine.common.recipe"].DelayedScaling = DelayedScaling  # type: ignore[attr-defined]
    found["transformer_engine.common.recipe"].Format = Format  # type: ignore[attr-defined]
    backends = {"use_fused_attention": True, "fused_attention_backend": "NVTE_FP8", "use_flash_attention": False}
    found["transformer_engine.pytorch.attention.dot_product_attention"]._attention_backends = backends  # type: ignore
    return found


def install(monkeypatch) -> type[State]:
    """Put the stand-in where Transformer Engine would be, and a GPU that everything runs on beside it."""
    from nemo_slam.modules import attention_backends, fp8

    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    State.recipe, State.entered, State.checkpoints, State.calls = None, 0, 0, []
    clear_caches()
    monkeypatch.setattr(fp8, "unavailable", lambda mode, device: None)
    monkeypatch.setattr(attention_backends, "te_unavailable", lambda settings, device, dtype: None)
    return State


def clear_caches() -> None:
    """What is remembered about the machine."""
    from nemo_slam.modules import attention_backends, fp8

    for function in (fp8.load, fp8.recipe, attention_backends.resolve_backend, attention_backends._packed_attention):
        getattr(function, "cache_clear", lambda: None)()  # a test may have replaced it
