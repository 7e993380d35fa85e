"""Where a result was measured: device, versions, commit. Every result file holds it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "nemo_toolkit", "triton", "transformer_engine")


def describe() -> dict[str, str | int | bool | None]:
    """Device, package versions (None where a package is missing), commit, time in UTC."""
    import torch

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""  # no git here, as in an image

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
