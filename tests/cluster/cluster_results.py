"""What ``make cluster-test`` measured: ``benchmarks/results/cluster_<time>.json``, once every case has passed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_slam.training.environment import environment

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


class ClusterResults:
    """Cases of one call.

    Args:
        expected: (name, machines) of all cases; without one of them nothing is written.
        folder: of result files.
    """

    def __init__(self, expected: Iterable[tuple[str, int]], folder: Path = FOLDER):
        self.expected, self.folder = list(expected), folder
        self.found: dict[tuple[str, int], dict[str, Any]] = {}
        self.environment = environment()  # of the start: a commit may come meanwhile
        self.load, self.began = os.getloadavg()[0], time.monotonic()

    def passed(self, case: str, nodes: int, strategy: str, **measured: Any) -> None:
        """To be called at a test's very end."""
        assert (case, nodes) in self.expected, f"no such case: {case}, {nodes} machines"
        self.found[case, nodes] = {"case": case, "nodes": nodes, "strategy": strategy, **measured}

    def write(self) -> Path | None:
        """The file, or None where a case has not passed, or was not asked for (``-k``)."""
        if missing := [
            f"{case} ({nodes} machines)" for case, nodes in self.expected if (case, nodes) not in self.found
        ]:
            print(f"\nno result file, without {', '.join(missing)}")
            return None
        result = {
            "benchmark": "cluster",
            **self.environment,
            "nodes": sorted({nodes for _, nodes in self.expected}),
            "network": "machines are network namespaces of one, on a bridge; gloo, one process a machine",
            "load_at_start": round(self.load, 2),
            "load_at_end": round(os.getloadavg()[0], 2),
            "seconds": round(time.monotonic() - self.began, 1),
            "cases": [self.found[case] for case in self.expected],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = self.environment["time"].replace(":", "").replace("+0000", "")
        path = self.folder / f"cluster_{stamp}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten: {path}")
        return path
