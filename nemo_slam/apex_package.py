"""Which ``apex`` is installed: NVIDIA's, or the unrelated web toolkit that the package index has under that name.

NeMo tries ``from apex.optimizers import FusedAdam`` when it is imported, and survives only an apex that is missing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

WRONG = (
    "the package 'apex' that is installed ({where}) is not NVIDIA's apex but the web toolkit that PyPI has under that "
    "name, and NeMo breaks on it: pip uninstall apex (docs/installation.md says how to get NVIDIA's, which is optional)"
)


def find() -> str | None:
    """``nvidia``, ``other``, or None if there is no ``apex``. Imports nothing of it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return "nvidia" if any((folder / "optimizers").is_dir() for folder in folders) else "other"


def refuse_other() -> None:
    """Raises ImportError if the wrong ``apex`` is installed."""
    if find() == "other":
        spec = importlib.util.find_spec("apex")
        raise ImportError(WRONG.format(where=spec.origin if spec else "unknown"))
