"""Starting from another run's weights, with an account of what was loaded."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from nemo_slam.training.checkpoints import find_damage


@dataclass
class LoadReport:
    """What became of each tensor, by name."""

    source: Path
    loaded: dict[str, int]
    left: dict[str, int]
    mismatched: dict[str, str]
    unexpected: list[str]

    @property
    def share(self) -> float:
        """Parameters loaded, as a share of the model's."""
        total = sum(self.loaded.values()) + sum(self.left.values())
        return sum(self.loaded.values()) / max(total, 1)

    def __str__(self) -> str:
        lines = [
            f"initialised from {self.source}: {len(self.loaded)} tensors, {sum(self.loaded.values()):,} parameters "
            f"({self.share:.1%} of the model)"
        ]
        lines += _listing("left as initialised", [f"{n} ({size:,})" for n, size in self.left.items()])
        lines += _listing("shapes differ, left as initialised", [f"{n} {why}" for n, why in self.mismatched.items()])
        lines += _listing("in the file but not in the model", self.unexpected)
        return "\n".join(lines)


def _listing(title: str, names: list[str], most: int = 12) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"  {title}: {', '.join(names[:most])}{more}"]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a ``.nemo`` archive or a Lightning ``.ckpt``, read as weights only: nothing in the file is run.

    Raises:
        ValueError: not such a file, or a damaged one.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"init_from: {path} does not exist")
    try:
        if path.suffix == ".nemo":
            with tarfile.open(path) as archive:
                member = next((m for m in archive.getmembers() if Path(m.name).name == "model_weights.ckpt"), None)
                file = archive.extractfile(member) if member is not None and member.isfile() else None
                if file is None:
                    raise ValueError(f"init_from: {path} holds no model_weights.ckpt, so it is not a NeMo model")
                return _read(file, path)
        with path.open("rb") as file:
            content = _read(file, path)
    except tarfile.TarError as error:
        raise ValueError(f"init_from: {path} is not a .nemo archive: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"init_from: {path} is damaged, or holds more than weights, which is refused ({error.args[0][:120]}). "
            "Expected a .nemo, or a checkpoint of scripts/speech_pretrain.py"
        ) from error
    if "state_dict" not in content:
        raise ValueError(f"init_from: {path} has no state_dict: expected a .nemo or a Lightning .ckpt")
    return content["state_dict"]


def _read(file: IO[bytes], path: Path) -> Any:
    archive = file.read(4) == b"PK\3\4"  # as torch tells its files from those before 1.6, which have no checksums
    problem = find_damage(file) if archive else None
    if problem is not None:
        raise ValueError(f"init_from: {path} is damaged ({problem:.200}): take another copy, or another checkpoint")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str | Path, minimum: float, prefix: str = ""
) -> LoadReport:
    """Copy the tensors that fit and account for the rest.

    Args:
        weights: the other model's state dict.
        minimum: share of the model's parameters below which this is an error.
        prefix: names in ``model`` are this plus the names in ``weights``.

    Raises:
        ValueError: less than ``minimum`` was loaded.
    """
    own = model.state_dict()
    report = LoadReport(Path(source), {}, {}, {}, [])
    fitting = {}
    for name, tensor in weights.items():
        target = own.get(prefix + name)
        if target is None:
            report.unexpected.append(name)
        elif target.shape != tensor.shape:
            report.mismatched[prefix + name] = f"{tuple(tensor.shape)} in the file, {tuple(target.shape)} in the model"
        else:
            fitting[prefix + name] = tensor
    for name, tensor in own.items():
        (report.loaded if name in fitting else report.left)[name] = tensor.numel()
    if report.share < minimum:
        raise ValueError(f"{report}\n  that is below the {minimum:.0%} wanted: is this file of the same model size?")
    model.load_state_dict(fitting, strict=False)
    return report
