"""Transformer Engine: FP8 products and attention, with weights that stay where they are.

Its modules are made when they are first used, are no submodules of ours, and borrow our weights for a call. So the
names of parameters and the contents of a state dict do not depend on ``fp8`` or on the machine; a model with ``fp8`` is
built, saved and loaded without a GPU. What they keep between steps, the scales of FP8, is saved with a run's
checkpoints by :class:`nemo_slam.training.precision.ScalingState`.

Nothing here imports Transformer Engine before CUDA is known to work: its import may fail without.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slam_kernels import BackendError

MODES = ("none", "gemm", "attention")
HEAD_SIZE = 128
"""The only head size whose FP8 attention cuDNN differentiates on Hopper."""
MULTIPLE = 16
"""Rows and columns of an FP8 product come in multiples of this."""
HISTORY = 64
"""Largest values remembered for each tensor's scale. Speech and multimodal encoder are two regions of a step, and each
region moves every history on: 64 are 32 steps. So does each layer that activation checkpointing computes again: with 24
of them 64 are two steps and a half."""


def check_config(mode: str, attention: str, head_size: int, dropout: float) -> None:
    """What FP8 asks of a config on any machine.

    Raises:
        ValueError: an unknown mode, or FP8 attention with a head size, dropout or backend that it cannot have.
    """
    if mode not in MODES:
        raise ValueError(f"fp8: {mode!r} is not one of {', '.join(MODES)}")
    if mode != "attention":
        return
    if attention not in ("auto", "te"):
        raise ValueError(f"fp8: attention is Transformer Engine's, but attention is {attention!r}: use auto or te")
    if head_size != HEAD_SIZE:
        raise ValueError(
            f"fp8: attention needs heads of size {HEAD_SIZE} (d_model / n_heads), not {head_size}: change n_heads, or "
            "use fp8: gemm"
        )
    if dropout > 0:
        raise ValueError(f"fp8: attention needs dropout_att 0, not {dropout}: set it to 0, or use fp8: gemm")


def transformer_engine_unavailable(device: torch.device) -> str | None:
    """Why Transformer Engine cannot be used on ``device``; None if it can. Imports it only where CUDA works."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"Transformer Engine needs an NVIDIA GPU, and the device is {device.type!r}"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed (docs/installation.md)"
    try:
        load()
    except Exception as error:  # a wheel for another CUDA or torch fails in many ways
        return f"Transformer Engine cannot be imported: {type(error).__name__}: {error}"
    return None


def unavailable(mode: str, device: torch.device) -> str | None:
    """Why a mode of ``fp8``, or with ``none`` Transformer Engine itself, cannot be used on ``device``."""
    reason = transformer_engine_unavailable(device)
    if reason is not None or mode == "none":
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    wanted, name = ((9, 0), "Hopper") if mode == "attention" else ((8, 9), "Ada")
    if (major, minor) < wanted:
        return f"fp8: {mode} needs compute capability {wanted[0]}.{wanted[1]} ({name}), this GPU has {major}.{minor}"
    available, why = load().is_fp8_available(return_reason=True)
    if not available:
        return f"Transformer Engine has no FP8 here: {why}"
    if mode == "attention" and torch.are_deterministic_algorithms_enabled():
        return "FP8 attention has no deterministic backward (trainer.deterministic=false, or fp8=gemm)"
    if mode == "attention":
        for name, wrong in (
            ("NVTE_FP8_DPA_BWD", "0"),
            ("NVTE_FUSED_ATTN", "0"),
            ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0"),
        ):
            if os.environ.get(name) == wrong:
                return f"the environment has {name}={wrong}, which switches FP8 attention or its backward off"
        if os.environ.get("NVTE_DPA_FP8_RECIPE"):
            return "the environment has NVTE_DPA_FP8_RECIPE, which replaces the recipe of FP8 attention: unset it"
    return None


def _headers() -> str | None:
    """A folder with CUDA's headers, which Transformer Engine compiles some kernels with; it does not look into pip's
    CUDA packages itself."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    roots.append(sysconfig.get_paths()["purelib"] + "/nvidia/cu13")
    for root in roots:
        folder = Path(root or "") / "include"
        if root and all((folder / name).is_file() for name in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp8.h")):
            return str(folder)
    return None


@functools.lru_cache
def load() -> Any:
    """``transformer_engine.pytorch``, with its environment prepared."""
    if "NVTE_CUDA_INCLUDE_DIR" not in os.environ:
        headers = _headers()
        if headers is not None:
            os.environ["NVTE_CUDA_INCLUDE_DIR"] = headers
        else:
            os.environ.setdefault("NVTE_DISABLE_NVRTC", "1")  # kernels that are compiled already, somewhat slower
    return importlib.import_module("transformer_engine.pytorch")


@functools.lru_cache
def recipe(mode: str) -> Any:
    """Delayed scaling, the one recipe with FP8 attention on Hopper.

    Scales are each rank's own (``reduce_amax``): blocks of attention differ from rank to rank, and a reduction over
    them would hang.
    """
    recipes = importlib.import_module("transformer_engine.common.recipe")
    return recipes.DelayedScaling(
        fp8_format=recipes.Format.HYBRID,
        amax_history_len=HISTORY,
        amax_compute_algo="max",
        reduce_amax=False,
        fp8_dpa=mode == "attention",
    )


def region(mode: str, device: torch.device) -> AbstractContextManager:
    """The context in which products run in FP8; nothing at all for ``none``, Transformer Engine's own is not entered.

    Raises:
        BackendError: ``mode`` cannot be had on ``device``.
    """
    if mode == "none":
        return nullcontext()
    require(mode, device)
    return _region(mode)


@contextmanager
def _region(mode: str) -> Iterator[None]:
    if not torch.is_inference_mode_enabled():
        with load().autocast(enabled=True, recipe=recipe(mode)):
            yield
        return
    # Scales that Transformer Engine makes in inference mode, in a validation that meets the first sequences of a width,
    # could not be written to by training: activation checkpointing would fail at them.
    with torch.inference_mode(False), torch.no_grad(), load().autocast(enabled=True, recipe=recipe(mode)):
        yield


def require(mode: str, device: torch.device) -> None:
    """Raises BackendError if ``mode`` cannot be had on ``device``."""
    reason = unavailable(mode, device)
    if reason is not None:
        raise BackendError(f"model.conformer.fp8={mode} on {device}: {reason}. Use model.conformer.fp8=none.")


def checkpoint(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Transformer Engine's activation checkpointing, which replays the scales of the forward pass.

    It looks for its own modules among a module's children, where ours are not: so it gets a plain function.
    """
    return load().checkpoint(lambda *inputs: function(*inputs), *arguments, use_reentrant=False)


class Borrower:
    """Makes one of Transformer Engine's modules on first use, and keeps what a checkpoint holds of it until then."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._module: Any = None
        self._saved: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> Borrower:
        """A copied model starts with scales of its own."""
        return type(self)(self._make)

    def module(self) -> Any:
        if self._module is None:
            self._module = self._make()
            if self._saved is not None:
                self._module.set_extra_state(self._saved)
        return self._module

    def state(self) -> Tensor | None:
        """The scales as Transformer Engine serialises them, or None before the first step."""
        return self._saved if self._module is None else self._module.get_extra_state()

    def load_state(self, state: Tensor) -> None:
        self._saved = state
        if self._module is not None:
            self._module.set_extra_state(state)


class Linear(Borrower):
    """``te.Linear`` on weights that someone else owns."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(lambda: self._linear(in_features, out_features))
        self.features = in_features, out_features

    def __deepcopy__(self, memo: dict) -> Linear:
        return Linear(*self.features)

    @staticmethod
    def _linear(in_features: int, out_features: int) -> Any:
        linear = load().Linear(in_features, out_features, bias=True, device="meta")
        del linear.weight, linear.bias  # ours are lent for each call
        return linear

    @torch.compiler.disable
    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """*Shape:* rows (N, in), weight (out, in), bias (out,) -> (N, out)."""
        linear = self.module()
        lent = vars(linear)
        lent["weight"], lent["bias"] = weight, bias
        try:
            return linear(rows)
        finally:
            del lent["weight"], lent["bias"]


def backend_in_use() -> str:
    """The attention that Transformer Engine chose in its last call, in its own words."""
    chosen = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention")._attention_backends
    if chosen["use_fused_attention"]:
        return f"FusedAttention ({chosen['fused_attention_backend']})"
    if chosen["use_flash_attention"]:
        return f"FlashAttention ({chosen['flash_attention_backend']})"
    return "UnfusedDotProductAttention" if chosen["use_unfused_attention"] else "none"
