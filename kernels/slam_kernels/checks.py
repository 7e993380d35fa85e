"""Argument checks shared by the operators: shapes and dtypes always, values only where reading them costs no sync."""

from __future__ import annotations

import torch


def check_layout(operator: str, cu_seqlens: torch.Tensor, num_rows: int) -> None:
    """``cu_seqlens`` is int32 ``(S + 1,)``; on the CPU also that it rises from 0 to ``num_rows``."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"{operator}: cu_seqlens must be int32 of shape (S + 1,) with S >= 1,"
            f" got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_rows or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"{operator}: cu_seqlens must rise from 0 to the number of rows {num_rows}, got {first} ... {last}"
            " (a tail after the last example is a sequence of its own)"
        )


def check_examples(operator: str, cu_seqlens: torch.Tensor, example_ids: torch.Tensor, epochs: torch.Tensor) -> None:
    """``example_ids`` and ``epochs`` are int64 ``(S,)`` on the layout's device."""
    sequences = cu_seqlens.numel() - 1
    for name, value in (("example_ids", example_ids), ("epochs", epochs)):
        if value.dtype != torch.int64 or tuple(value.shape) != (sequences,):
            raise ValueError(
                f"{operator}: {name} must be int64 of shape ({sequences},), one a sequence of cu_seqlens,"
                f" got {value.dtype} {tuple(value.shape)}"
            )
        if value.device != cu_seqlens.device:
            raise ValueError(f"{operator}: {name} is on {value.device}, cu_seqlens on {cu_seqlens.device}")


def check_index(operator: str, index: torch.Tensor) -> None:
    """``index`` is int64 ``(M,)``."""
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"{operator}: index must be int64 of shape (M,), got {index.dtype} {tuple(index.shape)}")


def check_probability(operator: str, name: str, value: float) -> None:
    """``value`` lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{operator}: {name}={value} must lie in [0, 1]")


def check_shape(operator: str, name: str, value: torch.Tensor, shape: tuple[int, ...]) -> None:
    """``value`` has exactly ``shape``."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{operator}: {name} must have shape {shape}, got {tuple(value.shape)}")
