"""The goals of a training step beside what ``train_step.py`` and ``fp8_losses.py`` measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"))
from goals import goal, lines

__all__ = ["lines", "of_losses", "of_train_step"]


def of_train_step(result: dict[str, Any]) -> list[dict[str, Any]]:
    """On a GPU: against stock NeMo, FP8 against bfloat16, share of the peak, of encoders and of whole steps. On a CPU:
    against stock NeMo, where a quarter of a padded batch is padding and where it is less."""
    cuda, peak = result["clock"] == "CUDA events", result["peak_flops_per_second"]
    rows = {(row["mix"], row["implementation"]): row for row in result["encoders"] if "error" not in row}
    found = []
    for (mix, name), row in rows.items():
        stock, ours = rows.get((mix, "stock")), rows.get((mix, "ours"))
        if name == "ours" and stock is not None:
            wanted = 1.5 if cuda else 1.2 if row["padding_share"] >= 0.25 else 1.0
            speed = row["frames_per_second"] / stock["frames_per_second"]
            found.append(goal(f"encoder, {mix}: ours against stock NeMo", wanted, speed))
        if name == "ours" and cuda:
            share = row["flops_per_second"] / peak
            found.append(goal(f"encoder, {mix}: share of the bfloat16 peak", 0.45, share, "share"))
        if "fp8" in name and ours is not None:
            speed = row["frames_per_second"] / ours["frames_per_second"]
            found.append(goal(f"encoder, {mix}: {name.split(', ')[1]} against bfloat16", 1.25, speed))
    steps = {tuple(key.rsplit(", fp8 ", 1)): step for key, step in result["steps"].items() if "error" not in step}
    for (mix, mode), step in steps.items() if cuda else ():
        plain = steps.get((mix, "none"))
        if mode == "none":
            share = step["flops_per_second"] / peak
            found.append(goal(f"full step, {mix}: share of the bfloat16 peak", 0.45, share, "share"))
        elif plain is not None:
            speed = step["frames_per_second"] / plain["frames_per_second"]
            found.append(goal(f"full step, {mix}: fp8 {mode} against bfloat16", 1.25, speed))
    return found


def of_losses(result: dict[str, Any], tolerance: float) -> list[dict[str, Any]]:
    """How far FP8's losses may be from bfloat16's."""
    return [
        goal(f"losses, fp8 {mode}: apart from bfloat16's", tolerance, run["difference"], "share", at_most=True)
        for mode, run in result["runs"].items()
        if mode != "none"
    ]
