"""A miniature corpus of tones and a pre-trained model of noise, made once for all fine-tuning tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a corpus that no test changes."""
    return write_corpus(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="session")
def tones_tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of the corpus's words."""
    from nemo_slam.data.tokenizer import train_tokenizer

    return train_tokenizer([corpus], tmp_path_factory.mktemp("spm"), 16, allow_smaller=True)


@pytest.fixture
def pretrained_nemo(model_config, tmp_path: Path) -> Path:
    """A ``.nemo`` of an untrained SLAMPretrainingModel."""
    import torch

    from nemo_slam.models.pretraining import SLAMPretrainingModel

    torch.manual_seed(5)
    path = tmp_path / "slam.nemo"
    SLAMPretrainingModel(model_config()).save_to(str(path))
    return path
