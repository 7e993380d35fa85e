"""What a ``.nemo`` archive holds beside weights.

It is read, never unpacked: a path in it is a name to look up, its YAML is data.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import yaml

_CONFIG_LIMIT = 16 << 20
_TOKENIZER_LIMIT = 256 << 20

ANYWHERE: dict[str, dict[Any, Any]] = {
    "kernels": {"triton": "auto"},
    "attention": {"varlen": "auto", "te": "auto"},
    "fp8": {"gemm": "none", "attention": "none"},
    "compile": {True: False},
}
"""Choices of a ``conformer`` node that hold for a machine and a run, and what stands for them in a ``.nemo``."""


def for_any_machine(config: MutableMapping[Any, Any]) -> None:
    """Leave open, in a model's config, what it chose for the machine that it was trained on: an explicit choice is an
    error where it cannot be had, and a model is restored elsewhere, and in another precision."""
    for node in (config.get("encoder"), config):
        conformer = None if node is None else node.get("conformer")
        if conformer is not None:
            changes = {key: into[conformer[key]] for key, into in ANYWHERE.items() if conformer.get(key) in into}
            conformer.update(changes)


def read_config(path: str | Path) -> dict[str, Any]:
    """The ``model_config.yaml`` of a ``.nemo`` archive, as plain data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NeMo archive.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive if Path(m.name).name == "model_config.yaml" and m.isfile()]
            if not members:
                raise ValueError(f"{path} holds no model_config.yaml, so it is not a NeMo model")
            if members[0].size > _CONFIG_LIMIT:
                raise ValueError(f"the model_config.yaml of {path} has {members[0].size} bytes: no config")
            file = archive.extractfile(members[0])
            assert file is not None
            config = yaml.safe_load(file.read())
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a .nemo archive: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the model_config.yaml of {path} is not plain YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the model_config.yaml of {path} holds no keys")
    return config


def read_tokenizer(path: Path, config: Mapping[str, Any]) -> bytes:
    """The SentencePiece model that the encoder's text went through, out of the archive.

    Raises:
        ValueError: the archive has none.
    """
    node = config.get("source_tokenizer") or config.get("tokenizer") or {}
    name = Path(str(node.get("model_path", "")).removeprefix("nemo:")).name
    with tarfile.open(path) as archive:
        member = next((m for m in archive if name and Path(m.name).name == name and m.isfile()), None)
        file = None if member is None else archive.extractfile(member)
        if member is None or file is None or member.size > _TOKENIZER_LIMIT:
            raise ValueError(f"init_from: {path} holds no tokenizer of its encoder's text")
        return file.read()
