"""A miniature corpus of tones and a pre-trained model of noise, made once for all fine-tuning tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tones import write_corpus


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
