"""An artificial language to prove cross-modal learning: 16 words, each always the same 120 ms chord, plus noise.

Whoever knows which word sounds how predicts every masked word from the speech, and whoever does not is left with
chance: 1 in 16. Sequences are drawn independently, so neither modality tells anything about itself.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from nemo_slam.data.corpora.files import SAMPLE_RATE, write_wav
from nemo_slam.data.corpora.layout import SPLITS, Row, finish, prepare_once
from nemo_slam.data.corpora.splits import group_splits

VERSION = 1
WORDS = tuple("abcdefghijklmnop")
SECONDS = 0.12
TONES = 3  # of a chord
FREQUENCIES = (200.0, 6000.0)  # hertz
LENGTHS = (3, 8)  # words of a sequence
SEQUENCES = 8000
FEWEST = 50  # with fewer, the hash may leave dev or test empty
NOISE = 0.1  # standard deviation, where a chord has 0.3 or so


def prepare(root: Path, sequences: int | None = None) -> Path:
    """Prepares the corpus below ``root``; returns at once if it is there already.

    Args:
        root: the corpus folder.
        sequences: how many, over all splits; no text is in two splits. None: ``SEQUENCES``, or what is there.

    Raises:
        ValueError: fewer than ``FEWEST`` sequences.
        CorpusError: ``root`` holds another corpus.
    """
    if sequences is not None and sequences < FEWEST:
        raise ValueError(f"sequences {sequences}: expected at least {FEWEST}")
    request = {"sequences": sequences, "version": VERSION}
    return prepare_once(root, "oracle_language", request, lambda: _build(root, sequences or SEQUENCES))


def chords() -> np.ndarray:
    """(16, samples of a word) float64: a few steady tones each, faded in and out over 5 ms."""
    draw = np.random.default_rng(0)
    time = np.arange(round(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    low, high = np.log(FREQUENCIES)
    tones = np.exp(draw.uniform(low, high, (len(WORDS), TONES, 1)))
    sound = np.sin(2 * np.pi * tones * time + draw.uniform(0, 2 * np.pi, tones.shape)).sum(axis=1) / TONES
    fade = np.minimum(1.0, np.minimum(time, time[::-1]) / 0.005)
    return 0.6 * sound * fade


def _build(root: Path, sequences: int) -> None:
    draw = np.random.default_rng(1)
    sounds = chords()
    chosen = [draw.integers(len(WORDS), size=draw.integers(LENGTHS[0], LENGTHS[1] + 1)) for _ in range(sequences)]
    names = {f"sequence-{i:06d}": " ".join(WORDS[w] for w in words) for i, words in enumerate(chosen)}
    splits = group_splits(((name, [text]) for name, text in names.items()), "oracle_language")
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for (name, text), words in zip(names.items(), chosen, strict=True):
        audio = sounds[words].reshape(-1)
        audio = np.clip(audio + NOISE * draw.standard_normal(len(audio)), -1, 1)
        write_wav(root / "audio" / f"{name}.wav", (32767 * audio).astype("<i2").tobytes())
        rows[splits[name]].append(
            {
                "audio_filepath": f"../audio/{name}.wav",
                "duration": len(audio) / SAMPLE_RATE,
                "text": text,
                "lang": "oracle",
                "synthetic": True,
            }
        )
    about = {
        "name": "oracle_language",
        "request": {"sequences": sequences, "version": VERSION},
        "synthetic": True,
        "licences": {"speech and text": "Apache-2.0 (made here)"},
    }
    lines = [" ".join(WORDS[w] for w in draw.integers(len(WORDS), size=12)) for _ in range(1000)]
    finish(root, {"oracle": rows}, lines, about, Counter())
