"""Lets NeMo instantiate and restore classes of this package.

NeMo 3.0 refuses every ``_target_`` outside ``nemo.core.classes.common.ALLOWED_TARGET_PREFIXES`` and has no public way
to add to it. Importing NeMo takes many seconds, so the prefix is added when NeMo's module is executed, not when ours
is.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from nemo_slam import apex_package

MODULE = "nemo.core.classes.common"
PREFIX = "nemo_slam."


def _allow(module: ModuleType) -> None:
    prefixes = getattr(module, "ALLOWED_TARGET_PREFIXES", None)
    if not isinstance(prefixes, list):
        raise ImportError(
            f"{MODULE}.ALLOWED_TARGET_PREFIXES is not a list in this version of NeMo, so nemo_slam cannot "
            "register its classes there: use nemo_toolkit 3.0, or report the version to nemo_slam"
        )
    if PREFIX not in prefixes:
        prefixes.append(PREFIX)


class _Finder:
    """Finds MODULE as usual and runs :func:`_allow` right after it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        apex_package.refuse_other()
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _allow(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Add our prefix now if NeMo is imported already, else as soon as it is."""
    if MODULE in sys.modules:
        _allow(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
