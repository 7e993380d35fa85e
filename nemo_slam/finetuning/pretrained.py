"""A pre-trained (or fine-tuned) ``.nemo`` as the start of a stock model: its architecture, features, encoder weights.

The archive is read, never unpacked: a path in it is a name to look up, its YAML is data, its weights are tensors only.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from nemo_slam.training.initialise import LoadReport, load_weights, read_weights

ENCODER = "nemo_slam.models.encoder.SLAMEncoder"
ENCODER_PARTS = ("speech_encoder.", "multimodal_encoder.")
RUN_TIME = frozenset({"dropout", "dropout_att", "attention", "kernels"})
"""Keys of ``encoder.conformer`` that no weight depends on: the fine-tuning config decides them."""

PREPROCESSOR = "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor"
_CONFIG_LIMIT = 16 << 20


@dataclass(frozen=True)
class Pretrained:
    """What fine-tuning takes from a ``.nemo``.

    Attributes:
        path: the archive.
        architecture: ``conformer``, ``speech_encoder`` and ``multimodal_encoder`` without the run-time keys.
        preprocessor: the features that the encoder was trained on.
        weights: the encoder's tensors, named as in ``SLAMEncoder``.
    """

    path: Path
    architecture: dict[str, dict[str, Any]]
    preprocessor: dict[str, Any]
    weights: dict[str, Tensor]

    def describe(self) -> str:
        width = self.architecture["conformer"].get("d_model")
        layers = [self.architecture[part].get("num_layers") for part in ("speech_encoder", "multimodal_encoder")]
        return f"width {width}, {layers[0]} + {layers[1]} layers, {len(self.weights)} tensors"


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


def read_pretrained(path: str | Path) -> Pretrained:
    """Read the encoder out of a ``.nemo`` of ours: of pre-training, or of a stock model with our encoder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NeMo archive, or none with a SLAM encoder.
    """
    path = Path(path)
    try:
        config = read_config(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"init_from: {error}") from error
    node = config.get("encoder", config)
    parts = ("conformer", "speech_encoder", "multimodal_encoder")
    if not isinstance(node, dict) or any(not isinstance(node.get(part), dict) for part in parts):
        raise ValueError(
            f"init_from: {path} ({config.get('target', 'unknown class')}) has no SLAM encoder: expected a .nemo of "
            "scripts/speech_pretrain.py or scripts/speech_finetune.py"
        )
    if not isinstance(config.get("preprocessor"), dict):
        raise ValueError(f"init_from: {path} has no preprocessor, so its features are unknown")
    architecture = {part: dict(node[part]) for part in parts}
    architecture["conformer"] = {k: v for k, v in architecture["conformer"].items() if k not in RUN_TIME}
    preprocessor = {**config["preprocessor"], "_target_": PREPROCESSOR, "dither": 0.0, "pad_to": 0}
    return Pretrained(path, architecture, preprocessor, encoder_weights(read_weights(path)))


def encoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors among a model's, under the names that ``SLAMEncoder`` gives them."""
    names = {name: name.removeprefix("encoder.") for name in weights}
    return {short: weights[name] for name, short in names.items() if short.startswith(ENCODER_PARTS)}


def encoder_node(node: Mapping[str, Any], pretrained: Pretrained | None) -> dict[str, Any]:
    """The encoder's config: what shapes weights comes from the file if there is one, the rest from ``node``.

    Args:
        node: ``model.encoder`` of the fine-tuning config.
    """
    conformer = dict(node["conformer"])
    if pretrained is not None:
        conformer = {**pretrained.architecture["conformer"], **{k: v for k, v in conformer.items() if k in RUN_TIME}}
        node = {**node, **pretrained.architecture}
    return {**node, "conformer": conformer, "d_model": conformer["d_model"], "_target_": ENCODER}


def initialise_encoder(encoder: nn.Module, pretrained: Pretrained, minimum: float) -> LoadReport:
    """Copy the weights and account for them.

    Raises:
        ValueError: less than ``minimum`` of the encoder's parameters was loaded.
    """
    return load_weights(encoder, pretrained.weights, pretrained.path, minimum)
