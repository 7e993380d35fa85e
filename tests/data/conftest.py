"""A tiny corpus: tones named by their level, a manifest, text and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from corpus_helpers import sentence, write_manifest, write_tone


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
