"""What fine-tuning on speech and on text have in common: manifests, target tokenizers, the interface that
``finetune`` drives."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf

from nemo_slam.config import ConfigError
from nemo_slam.data.bad_rows import BadRows, EmptyStreamError
from nemo_slam.data.corpora.files import write_text
from nemo_slam.data.manifest import expand_paths
from nemo_slam.data.stream import Stream
from nemo_slam.data.tokenizer import train_on_lines
from nemo_slam.finetuning.loader import Collate
from nemo_slam.finetuning.pretrained import Pretrained


class Task(ABC):
    """Everything that depends on what comes in and what is to come out.

    Args:
        cfg: the whole config.
        run_folder: tokenizers that are trained go here.
        pretrained: the encoder to start from, or None.

    Attributes:
        volume: see ``FineTuneMetrics``.
    """

    volume: tuple[str, float]

    def __init__(self, cfg: DictConfig, run_folder: Path, pretrained: Pretrained | None):
        self.cfg, self.run_folder, self.pretrained = cfg, run_folder, pretrained

    @abstractmethod
    def model_node(self) -> DictConfig:
        """The model's own config."""

    @abstractmethod
    def stream(self, model: ModelPT, split: str, bad_rows: BadRows) -> Stream | None:
        """The ``train`` or ``validation`` stream, or None where the config has none."""

    @abstractmethod
    def collate(self, model: ModelPT) -> Collate:
        """Examples of the stream to the batch that the model takes."""

    @abstractmethod
    def describe(self, model: ModelPT) -> list[tuple[str, str]]:
        """Rows of the start-up table."""

    def stock_datasets(self) -> dict[str, dict[str, Any]]:
        """Data sections that go into the saved model."""
        return {}


def plain(node: Any) -> dict[str, Any]:
    """A config node as a dict of plain values, interpolations resolved."""
    found = OmegaConf.to_container(node, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def manifests(data: DictConfig, split: str) -> list[Path]:
    """The files of ``data.train_ds`` or ``data.validation_ds``; none where the section is null."""
    node = data.get(split)
    if node is None:
        return []
    paths = node.manifest_filepath
    return expand_paths([paths] if isinstance(paths, str) else list(paths))


def prepare_corpus(data: DictConfig) -> None:
    """Prepare the corpus on first use, where the config names a recipe.

    Raises:
        FileNotFoundError: a manifest does not exist.
    """
    if data.prepare is not None:
        from nemo_slam.data.corpora import prepare

        prepare(data.prepare, data.root)
    for split in ("train_ds", "validation_ds"):
        for path in manifests(data, split):
            if not path.is_file():
                there = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
                known = f"; in {path.parent} there are {', '.join(there)}" if there else ""
                raise FileNotFoundError(
                    f"data.{split}.manifest_filepath: {path} does not exist{known}. Name another manifest, or the "
                    "language (data.language) of one that is there"
                )


def check_tokenizer(folder: str | Path, where: str) -> Path:
    """The folder, which must hold what NeMo's BPE models read.

    Raises:
        FileNotFoundError: it does not.
    """
    for name in ("tokenizer.model", "tokenizer.vocab", "vocab.txt"):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(
                f"{where}: {folder} holds no {name}; train a tokenizer with scripts/train_tokenizer.py"
            )
    return Path(folder)


def train_once(
    folder: Path,
    data: DictConfig,
    key_name: str,
    read: Callable[[list[Path], str], Iterable[str]],
    size: int,
    **options,
) -> Path:
    """A tokenizer in ``folder``, trained on the training rows' texts unless it is there.

    Args:
        key_name: the key of ``data.train_ds`` that names the rows' key.
        read: gives the texts of manifests under a key.

    Raises:
        EmptyStreamError: no row has such a text.
        ConfigError: the one that is there was trained with other settings, or on other files.
    """
    key, files = data.train_ds[key_name], manifests(data, "train_ds")
    settings = {
        "vocab_size": size,
        **options,
        "key": key,
        "files": [[path.name, path.stat().st_size] for path in files],
    }
    record = folder / "trained_with.json"
    if (folder / "tokenizer.model").is_file():
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else settings
        if other := [
            f"{name} {before.get(name)}, not {value}" for name, value in settings.items() if before.get(name) != value
        ]:
            raise ConfigError(
                f"{folder} holds a tokenizer that an earlier start of this run trained with {'; '.join(other)}. Give "
                "the new run another name; or remove that folder, if the run has no checkpoint yet to resume from"
            )
        return folder
    texts = list(read(files, key))
    if not texts:
        names = ", ".join(map(str, files))
        raise EmptyStreamError(f"data.train_ds: no row of {names} has a string {key!r} (data.train_ds.{key_name})")
    write_text(record, json.dumps(settings, ensure_ascii=False) + "\n")  # before the tokenizer, whose model comes last
    train_on_lines(texts, folder, size, allow_smaller=True, **options)
    return folder


def check_sequence_symbols(tokenizer: Any) -> dict[str, int]:
    """What attention decoders want around a text, for ``collate``.

    Raises:
        ValueError: the tokenizer lacks them.
    """
    tokens = {"pad_id": tokenizer.pad_id, "start_id": tokenizer.bos_id, "end_id": tokenizer.eos_id}
    if min(tokens.values()) < 0:
        raise ValueError(
            "model.tokenizer.dir: this tokenizer has no <s>, </s> and <pad>, which attention decoders need; train one "
            "with scripts/train_tokenizer.py --sequence-symbols, or set model.tokenizer.dir=null"
        )
    return tokens
