"""Writing tiny corpora: tones, manifests, sentences of invented words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

WORDS = [a + b for a in ("ba", "ke", "li", "mo", "nu", "ra", "so", "ti") for b in ("den", "fal", "gor", "hus", "pim")]


def write_tone(path: Path, seconds: float, rate: int = 16_000, channels: int = 1, level: float = 0.25) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = np.full((round(seconds * rate), channels), level, np.float32)
    soundfile.write(path, tone, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def write_manifest(path: Path, rows: list[dict | str | bytes]) -> Path:
    """Dicts become JSON; strings and bytes are written as they are."""
    lines = [json.dumps(r) if isinstance(r, dict) else r for r in rows]
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def sentence(i: int, words: int) -> str:
    rng = np.random.default_rng(i)
    return " ".join(rng.choice(WORDS, words))
