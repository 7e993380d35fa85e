"""Whole runs of several processes."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing


@pytest.fixture(scope="session")
def context():
    """Processes of a server that has imported NeMo once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_slam.training.pretrain"])
    return context


@pytest.fixture
def start_ranks(context, tmp_path: Path):
    """A function (module that holds the run, config of each rank) -> what each rank wrote; see ``parallel_worker``."""
    from parallel_worker import work

    numbers = itertools.count()

    def run(module: str, configs: list[Any]) -> list[dict[str, Any]]:
        out = tmp_path / f"results_{next(numbers)}"
        out.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        jobs = [
            context.Process(target=work, args=(rank, len(configs), port, config, out, module))
            for rank, config in enumerate(configs)
        ]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(timeout=900)
        assert [job.exitcode for job in jobs] == [0] * len(configs)
        return [torch.load(out / f"{rank}.pt") for rank in range(len(configs))]

    return run
