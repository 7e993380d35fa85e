"""Corpus recipes: each prepares one corpus in the layout described in docs/data.md.

>>> from nemo_slam.data.corpora import prepare
>>> root = prepare("prompts", "data/prompts")          # doctest: +SKIP

One file a corpus; `layout.py` writes what the small ones share (manifests, text, `corpus.json`), `parts.py` that of the
large ones, whose audio stays where it is.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

# name -> module of this package, and its function (root, **options) -> Path
RECIPES = {
    "prompts": ("prompts", "prepare"),
    "mini_librispeech": ("mini_librispeech", "prepare"),
    "synthetic": ("synthetic", "prepare"),
    "oracle_language": ("oracle_language", "prepare"),
    "librispeech": ("librispeech", "prepare"),
    "libri_light": ("libri_light", "prepare"),
    "librispeech_lm": ("text_corpora", "prepare_librispeech_lm"),
    "mc4": ("text_corpora", "prepare_mc4"),
    "covost2": ("covost2", "prepare"),
    "lhotse": ("from_lhotse", "prepare"),
}


def prepare(name: str, root: str | Path, **options) -> Path:
    """Prepares corpus ``name`` below ``root`` unless it is there already; safe if several processes call it at once.

    Args:
        name: one of ``RECIPES``.
        root: the corpus folder; made if missing.
        options: the recipe's own options (``languages`` for ``prompts``, ...).

    Returns:
        ``root`` as a path, holding ``corpus.json``, and ``manifests/`` and ``text/`` where it has such.

    Raises:
        ValueError: unknown name.
        CorpusError: the corpus cannot be had here; the message names the ways out.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown corpus {name!r}: expected one of {', '.join(RECIPES)}")
    module, function = RECIPES[name]
    return getattr(import_module(f"{__name__}.{module}"), function)(Path(root), **options)
