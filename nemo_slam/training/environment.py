"""What a run ran on: written into its folder when it starts, so that a report made later, elsewhere, can tell.

Result files of benchmarks hold the same."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import nemo_slam

FILE_NAME = "environment.json"
PACKAGES = ("triton", "nemo_toolkit", "lightning", "transformer_engine", "numpy")


def package_versions() -> dict[str, str]:
    """Python and what results depend on; a package that is not installed is left out."""
    import torch

    # torch's own word names the build (+cpu, +cu130), which its package's metadata may leave out.
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in PACKAGES:  # by `version`, which takes nemo_toolkit for nemo-toolkit
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def environment() -> dict[str, str]:
    """Versions, device, commit and time (UTC) of this process; strings all."""
    import torch

    found = {"nemo_slam": nemo_slam.__version__, "commit": _commit(), **package_versions()}
    found["device"] = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name(0)
        found["GPU"] = f"{torch.cuda.device_count()} x {found['device']}"
        found["CUDA"] = str(torch.version.cuda)
    found["CPU"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    found["system"] = platform.platform()
    found["command"] = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return found


def write_environment(folder: Path) -> None:
    """Write :func:`environment` as ``environment.json``; a resumed run overwrites it."""
    part = folder / f"{FILE_NAME}.part"
    part.write_text(json.dumps(environment(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, folder / FILE_NAME)


def _commit() -> str:
    """The commit of the source tree, with a + where it has changes; what is installed without one has none."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if commit.returncode or not (root / ".git").exists():
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
