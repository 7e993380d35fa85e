"""What numbers a run computes with: checked before the first step, told in the start-up table, kept over a resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from nemo_slam.modules import fp8
from nemo_slam.modules.attention_backends import resolve_backend
from nemo_slam.modules.attention_te import TransformerEngineAttention
from nemo_slam.modules.conformer import ConformerConfig, PackedConformerLayer
from nemo_slam.packing import SequenceLayout
from nemo_slam.training import optimizers
from nemo_slam.training.parallel import of_every_rank
from slam_kernels import BackendError
from slam_kernels import backend as kernel_backend

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "64-true": torch.float64,
}
"""Type that matrix products get, by ``trainer.precision``."""

optimizers.register()


def check_run(
    encoder: nn.Module,
    config: ConformerConfig,
    pad_multiple: int,
    optimizer: str,
    precision: str,
    device: torch.device,
    sharded: bool = False,
) -> list[tuple[str, str]]:
    """Rows of the start-up table, or an error for what this machine cannot do.

    Args:
        encoder: holds the Conformer layers.
        pad_multiple: packed rows are rounded up to a multiple of this, but on a CPU.
        optimizer: ``model.optim.name``.
        precision: ``trainer.precision``.
        device: what the run trains on.
        sharded: whether the weights will be (``parallel.strategy=fsdp2``).

    Raises:
        BackendError: a backend or FP8 that cannot be had.
        ValueError: a combination that cannot be, or an optimizer that is not installed.
    """
    chosen = config.fp8
    if chosen != "none":
        if precision != "bf16-mixed":
            raise ValueError(
                f"model.conformer.fp8={chosen} goes with trainer.precision=bf16-mixed (float32 weights, bfloat16 "
                f"beside FP8), not {precision}"
            )
        if pad_multiple % fp8.MULTIPLE:
            raise ValueError(
                f"model.conformer.fp8={chosen} needs model.pad_multiple to be a multiple of {fp8.MULTIPLE}, not "
                f"{pad_multiple}"
            )
        fp8.require(chosen, device)
    if precision not in DTYPES:  # bf16-true, 16-true, transformer-engine: Lightning casts every batch and buffer too
        raise ValueError(
            f"trainer.precision={precision} would also round the waveform, the mel filters and the weights to half "
            f"precision, and training needs those as they are: use bf16-mixed ({', '.join(DTYPES)} are possible)"
        )
    layer = next(module for module in encoder.modules() if isinstance(module, PackedConformerLayer))
    dtype = DTYPES[precision]
    backend = resolve_backend(layer.self_attn.settings, device, dtype)
    in_use = ""
    if backend == "te":
        in_use = f": {try_transformer_engine(layer, pad_multiple, device, dtype)}"
    weights = "; float32 weights" if precision.endswith("-mixed") else ""
    switches = [
        name for name, on in (("checkpointed", config.activation_checkpointing), ("compiled", config.compile)) if on
    ]
    return [
        ("precision", f"{precision}{weights}" + (f"; FP8: {chosen}" if chosen != "none" else "")),
        ("kernels", f"{kernel_backend.resolve(config.kernels, device)} (kernels: {config.kernels})"),
        ("attention", f"{backend}{in_use} (attention: {config.attention})"),
        ("layers", ", ".join(switches) or "activations kept, not compiled"),
        ("optimizer", f"{optimizers.implementation(optimizer, device, sharded)} (optim: {optimizer})"),
    ]


def try_transformer_engine(
    layer: PackedConformerLayer, pad_multiple: int, device: torch.device, dtype: torch.dtype
) -> str:
    """Run attention once, forward and backward, as the run will; what Transformer Engine chose for it.

    Draws no random number. The modules are thrown away: scales that they met here are no start for training.

    Raises:
        BackendError: it fails; Transformer Engine's message says why.
    """
    settings = layer.self_attn.settings
    attention = TransformerEngineAttention(settings.heads, settings.head_size, settings.dropout)
    try:
        with torch.cuda.device(device):  # page-locked memory too: else every rank would hold a context on GPU 0
            layout = SequenceLayout.build(np.array([3 * pad_multiple, 70]), device, pad_multiple)
            shape = (layout.num_rows, 3, settings.heads, settings.head_size)
            qkv = torch.linspace(-1, 1, layout.num_rows * 3 * settings.heads * settings.head_size, device=device)
            qkv = qkv.view(shape).sin().to(dtype).requires_grad_()
            with fp8.region(settings.fp8, device):
                out = attention.attend(qkv, layout, training=True)
            out.float().square().sum().backward()
            torch.cuda.synchronize()
    except Exception as error:
        raise BackendError(
            f"Transformer Engine's attention failed on {device} with model.conformer.fp8={settings.fp8}: "
            f"{type(error).__name__}: {error}. Use model.conformer.attention=auto and model.conformer.fp8=none, or "
            "find the reason with NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2"
        ) from error
    used = fp8.backend_in_use()
    if settings.fp8 == "attention" and "FP8" not in used:
        raise BackendError(
            f"model.conformer.fp8=attention: Transformer Engine chose {used}, which is not FP8 attention"
        )
    return used


def borrowers(model: nn.Module) -> dict[str, dict[str, fp8.Borrower]]:
    """Everything of a model that keeps scales of FP8, by the name of its module."""
    found: dict[str, dict[str, fp8.Borrower]] = {}
    for name, module in model.named_modules():
        for attribute in ("products", "transformer_engine"):
            group = vars(module).get(attribute)
            if isinstance(group, dict):
                found[f"{name}.{attribute}"] = group
    return found


class ScalingState(Callback):
    """Keeps FP8's scales in a checkpoint, each rank's own: they are functions of the steps so far, and no weights.

    They stand beside the state dict under ``fp8_scales``; a run without FP8 leaves them alone, and one that starts
    FP8 from a checkpoint without them finds scales within a few steps.
    """

    KEY = "fp8_scales"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        own: dict[str, Tensor] = {}
        for name, group in borrowers(pl_module).items():
            for key, borrower in group.items():
                state = borrower.state()
                if state is not None and state.numel():
                    own[f"{name}/{key}"] = state
        shares = of_every_rank(own)
        if any(shares):
            checkpoint[self.KEY] = shares

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        shares = checkpoint.get(self.KEY)
        if not shares:
            return
        mine = shares[trainer.global_rank % len(shares)]  # with more ranks than before, another's are a fair start
        groups = borrowers(pl_module)
        for path, state in mine.items():
            name, _, key = path.rpartition("/")
            group = groups.get(name, {})
            if key in group or isinstance(group, TransformerEngineAttention):  # which makes its widths as they come
                group[key].load_state(state)
