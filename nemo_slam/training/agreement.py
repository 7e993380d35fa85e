"""Ranks that would train something else than the others are found out before the first step."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

import nemo_slam
import slam_kernels
from nemo_slam.config import flattened
from nemo_slam.training.environment import package_versions
from nemo_slam.training.parallel import of_every_rank

MOST = 10
"""Differences that a message lists."""


class DisagreementError(RuntimeError):
    """Ranks were started with different configs, data or code."""


def source_digest() -> str:
    """Of every Python file of this project's packages."""
    digest = hashlib.blake2b(digest_size=8)
    for package in (nemo_slam, slam_kernels):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def facts(cfg: DictConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same on all ranks.

    Args:
        cfg: the config, with its interpolations.
        data: what decides which examples a step holds, by name.
    """
    config = flattened(OmegaConf.to_container(cfg, resolve=True), "config")
    code = {"code.nemo_slam": source_digest(), **flattened(package_versions(), "code")}
    return {**config, **flattened(dict(data), "data"), **code}


def differences(all_facts: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> list[str]:
    """A line for every fact and rank that is not as on most ranks; of equally many, rank 0's side counts as most."""
    lines = []
    missing = "not there"
    for key in dict.fromkeys(key for each in all_facts for key in each):
        values = [json.dumps(each[key], sort_keys=True) if key in each else missing for each in all_facts]
        usual, _ = Counter(values).most_common(1)[0]  # of equals, the first that was met
        lines += [
            f"rank {rank} ({hosts[rank]}): {key} is {value}, elsewhere {usual}"
            for rank, value in enumerate(values)
            if value != usual
        ]
    return lines


class Agreement(Callback):
    """Compares what the ranks were started with, once all of them are connected.

    Args:
        own: this rank's `facts`.
    """

    def __init__(self, own: Mapping[str, Any]):
        self.own = dict(own)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or not dist.is_initialized():
            return
        # A short hash from everyone first: only if they differ does the whole config of every rank travel.
        digest = hashlib.blake2b(json.dumps(self.own, sort_keys=True).encode(), digest_size=16).hexdigest()
        if len(set(of_every_rank(digest))) == 1:
            return
        everyone = of_every_rank((socket.gethostname(), self.own))
        lines = differences([own for _, own in everyone], [host for host, _ in everyone])
        more = [f"and {len(lines) - MOST} more"] if len(lines) > MOST else []
        raise DisagreementError(
            "\n  ".join(["the ranks were not started alike; start all of them with the same:", *lines[:MOST], *more])
        )
