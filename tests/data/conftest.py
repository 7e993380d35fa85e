"""A tiny corpus: tones named by their index, a manifest and a tokenizer; and ways to build bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
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


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(sentence(i, 12) for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=64,
        model_type="bpe",
        minloglevel=2,
        num_threads=1,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory) -> Path:
    """Read-only: 40 utterances of 0.4 to 2.35 s whose level tells which they are; `manifest.json`."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for i in range(40):
        seconds = 0.4 + 0.05 * ((i * 17) % 40)
        write_tone(folder / "audio" / f"{i}.wav", seconds, level=(i + 1) / 64)
        text = sentence(i, max(1, round(3 * seconds)))
        rows.append({"audio_filepath": f"audio/{i}.wav", "duration": seconds, "text": text})
    write_manifest(folder / "manifest.json", rows)
    (folder / "text.txt").write_text("".join(sentence(1000 + i, 1 + i % 9) + "\n" for i in range(120)))
    return folder
