"""Corpus recipes: each prepares one corpus in the layout described in docs/data.md.

>>> from nemo_slam.data.corpora import prepare
>>> root = prepare("prompts", "data/prompts")          # doctest: +SKIP

One file a corpus; `layout.py` writes what they share (manifests, text, `corpus.json`).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

# name -> module of this package that defines prepare(root, **options) -> Path
RECIPES = {
    "prompts": "prompts",
    "mini_librispeech": "mini_librispeech",
    "synthetic": "synthetic",
    "oracle_language": "oracle_language",
}


def prepare(name: str, root: str | Path, **options) -> Path:
    """Prepares corpus ``name`` below ``root`` unless it is there already; safe if several processes call it at once.

    Args:
        name: one of ``RECIPES``.
        root: the corpus folder; made if missing.
        options: the recipe's own options (``languages`` for ``prompts``, ...).

    Returns:
        ``root`` as a path, holding ``corpus.json``, ``manifests/`` and ``text/``.

    Raises:
        ValueError: unknown name.
        CorpusError: the corpus cannot be had here; the message names the ways out.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown corpus {name!r}: expected one of {', '.join(RECIPES)}")
    return import_module(f"{__name__}.{RECIPES[name]}").prepare(Path(root), **options)
