"""Which implementation runs: the Triton kernels or their PyTorch twins."""

from __future__ import annotations

import importlib.util
import os

import torch

CHOICES = ("auto", "triton", "torch")
_INSTALLED = importlib.util.find_spec("triton") is not None  # once: a compiled layer asks too, and cannot trace this


class BackendError(RuntimeError):
    """An explicit choice of backend that this machine or tensor cannot have."""


def triton_unavailable(device: torch.device | str) -> str | None:
    """Why the Triton kernels cannot run on ``device``; None if they can.

    On the CPU they run under Triton's interpreter alone (``TRITON_INTERPRET=1`` set before Python starts), which is for
    tests: it is hundreds of times slower than the twins.
    """
    device = torch.device(device)
    if not _INSTALLED:
        return "the package triton is not installed (pip install --no-deps a triton that pairs with this torch)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            return None
        return "Triton kernels need an NVIDIA GPU (TRITON_INTERPRET=1 runs them on the CPU, for tests only)"
    if device.type != "cuda":
        return f"Triton kernels are written for CUDA devices, not for {device.type!r}"
    if not torch.cuda.is_available():
        return "no CUDA device can be used by this torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0 (Ampere)"
    return None


def resolve(choice: str, device: torch.device | str) -> str:
    """Turns the config's ``kernels: auto|triton|torch`` into the operators' ``backend``.

    ``auto`` means the Triton kernels on a GPU that can run them and the twins elsewhere (also under the interpreter).

    Raises:
        ValueError: ``choice`` is none of the three.
        BackendError: ``triton`` was asked for and cannot be had; the message says why.

    >>> resolve("auto", "cpu")
    'torch'
    """
    if choice not in CHOICES:
        raise ValueError(f"kernels={choice!r}: expected one of {', '.join(CHOICES)}")
    device = torch.device(device)
    if choice == "torch":
        return "torch"
    reason = triton_unavailable(device)
    if choice == "auto":
        return "triton" if device.type == "cuda" and reason is None else "torch"
    if reason is not None:
        raise BackendError(f"kernels=triton on {device}: {reason}. Use kernels=auto or kernels=torch.")
    return "triton"


def use_triton(backend: str, tensor: torch.Tensor, operator: str) -> bool:
    """Whether an operator called with ``backend`` goes to its Triton kernel; an error where it cannot."""
    if backend == "torch":
        return False
    if backend != "triton":
        raise ValueError(
            f"{operator}: backend={backend!r}: expected 'torch' or 'triton' (resolve() turns 'auto' into one)"
        )
    if not torch.compiler.is_compiling():
        reason = triton_unavailable(tensor.device)
        if reason is not None:
            raise BackendError(f"{operator}: backend='triton' on {tensor.device}: {reason}. Use backend='torch'.")
    return True
