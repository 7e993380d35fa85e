"""AdamW in the fastest implementation that a machine has, under the name ``auto`` in NeMo's registry of optimizers."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from nemo.core.config.optimizers import AdamWParams
from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS, register_optimizer
from torch.distributed.tensor import DTensor

from nemo_slam import apex_package

NAME = "auto"


def implementation(name: str, device: torch.device, sharded: bool = False) -> str:
    """What ``model.optim.name`` means for parameters on ``device``, which may be in shards (DTensors).

    Raises:
        ValueError: ``fused_adam``, NVIDIA apex's, cannot be had.
    """
    apex = apex_package.find()
    if name == "fused_adam":
        if apex == "other":
            raise ValueError(f"model.optim.name=fused_adam: {apex_package.WRONG.format(where='apex')}")
        if apex is None:
            raise ValueError(
                "model.optim.name=fused_adam needs NVIDIA's apex, which is not installed (docs/installation.md; never "
                "pip install apex). model.optim.name=auto takes it where it is, and torch's fused AdamW elsewhere"
            )
        if device.type != "cuda":
            raise ValueError(f"model.optim.name=fused_adam needs a CUDA device, not {device.type!r}: use adamw or auto")
        if sharded:
            raise ValueError("model.optim.name=fused_adam takes no shards (parallel.strategy=fsdp2): use auto")
        return "NVIDIA apex FusedAdam"
    if name == NAME:
        if device.type != "cuda":
            return "torch AdamW"
        # apex's kernels want a tensor's own memory, which a shard's DTensor has not.
        return "NVIDIA apex FusedAdam" if apex == "nvidia" and not sharded else "torch AdamW, fused"
    return f"torch {name}"


class FastestAdamW:
    """Makes AdamW: NVIDIA apex's ``FusedAdam`` on a GPU where apex is installed, else torch's, fused on a GPU; torch's
    for weights in shards.

    Decoupled weight decay in either; with a decay of 0 this is Adam. The optimizer's state is float32, as the weights
    are.
    """

    def __new__(cls, params: Iterable[Any], **options: Any) -> Any:
        groups = list(params)
        if implementation(NAME, _device(groups), isinstance(_first(groups), DTensor)) == "NVIDIA apex FusedAdam":
            return _apex_class()(groups, adam_w_mode=True, **options)
        return TorchAdamW(groups, **options)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        """Says what there is to set; it never runs, since what is made is no instance of this class."""


class TorchAdamW(torch.optim.AdamW):
    """torch's, fused on a GPU; without decay unless one is given, as apex's (torch's own default is 0.01)."""

    def __init__(
        self, params: list[Any], betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0, **options: Any
    ):
        fused = True if _device(params).type == "cuda" else None
        super().__init__(params, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=fused, **options)
        # A fused optimizer claims that it divides by a loss scale itself, at which Lightning refuses to clip. There is
        # no loss scale in bfloat16 (the guard refuses 16-mixed).
        self._step_supports_amp_scaling = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also from a run on apex, whose state counts steps once a group."""
        steps = [group.get("step") for group in state_dict["param_groups"]]
        if any(step is not None for step in steps):
            state = {number: dict(values) for number, values in state_dict["state"].items()}
            for group, step in zip(state_dict["param_groups"], steps, strict=True):
                for number in group["params"]:
                    if number in state:
                        state[number].setdefault("step", torch.tensor(float(step or 0)))
            groups = [{k: v for k, v in group.items() if k != "step"} for group in state_dict["param_groups"]]
            own = self.state_dict()["param_groups"]
            # apex's groups lack what torch's have, for instance `fused`: that is this machine's.
            groups = [{**mine, **theirs} for mine, theirs in zip(own, groups, strict=True)]
            state_dict = {**state_dict, "state": state, "param_groups": groups}
        super().load_state_dict(state_dict)


def _apex_class() -> Any:
    """NVIDIA apex's ``FusedAdam``, which also loads the state of torch's AdamW: apex counts steps once a group."""
    fused_adam: Any = importlib.import_module("apex.optimizers").FusedAdam

    class ApexFusedAdam(fused_adam):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            state, groups = state_dict["state"], []
            for group, own in zip(state_dict["param_groups"], self.state_dict()["param_groups"], strict=True):
                steps = [int(state[number]["step"]) for number in group["params"] if "step" in state.get(number, {})]
                known = {key: value for key, value in group.items() if key in own or key == "step"}
                groups.append({**own, **known, **({"step": max(steps)} if steps else {})})
            state = {n: {k: v for k, v in values.items() if k != "step"} for n, values in state.items()}
            super().load_state_dict({**state_dict, "state": state, "param_groups": groups})

    return ApexFusedAdam


def _first(groups: list[Any]) -> torch.Tensor:
    """The first parameter of a list of parameters or of parameter groups."""
    return next(iter(groups[0]["params"] if isinstance(groups[0], dict) else groups))


def _device(groups: list[Any]) -> torch.device:
    return _first(groups).device


def register() -> None:
    """Make ``model.optim.name: auto`` known to NeMo."""
    if NAME not in AVAILABLE_OPTIMIZERS:
        register_optimizer(NAME, FastestAdamW, AdamWParams())
