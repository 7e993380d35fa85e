"""Speech without speakers: words are tones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

WORDS = {"uno": 500, "dos": 900, "tres": 1500, "si": 2300, "no": 3100}
"""Each word is a tone of this many Hz, 300 ms long."""


def write_corpus(root: Path, rows: int = 12, seed: int = 0) -> Path:
    """Write wavs of tones and ``manifest.json``; utterance k has k % 5 + 1 words. Returns the manifest."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):
        words = [list(WORDS)[i] for i in rng.integers(0, len(WORDS), number % 5 + 1)]
        time = np.arange(4800) / 16000
        audio = np.concatenate([0.3 * np.sin(2 * np.pi * WORDS[word] * time) for word in words])
        audio = audio + 0.01 * rng.standard_normal(len(audio))
        soundfile.write(root / f"{number}.wav", audio, 16000)
        lines.append(
            {
                "audio_filepath": f"{number}.wav",
                "duration": len(audio) / 16000,
                "text": " ".join(words),
                "lang": "es" if number % 2 else "en",
                "translation": " ".join(reversed(words)),
            }
        )
    manifest = root / "manifest.json"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest
