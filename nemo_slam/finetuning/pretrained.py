"""A pre-trained (or fine-tuned) ``.nemo`` as the start of another model: its architecture, features, encoder weights.

The archive is read, never unpacked: a path in it is a name to look up, its YAML is data, its weights are tensors only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nemo_slam.archive import read_config, read_tokenizer
from nemo_slam.training.initialise import LoadReport, load_weights, read_weights

ENCODER = "nemo_slam.models.encoder.SLAMEncoder"
TEXT_ENCODER = "nemo_slam.finetuning.text_encoder.SLAMTextEncoder"
PARTS = {"speech": ("speech_encoder", "multimodal_encoder"), "text": ("text_encoder", "multimodal_encoder")}
"""Modules of an encoder, by what comes in."""

RUN_TIME = frozenset({"dropout", "dropout_att", "attention", "kernels", "fp8", "activation_checkpointing", "compile"})
"""Keys of ``encoder.conformer`` that no weight depends on: the fine-tuning config decides them."""

PREPROCESSOR = "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor"


@dataclass(frozen=True)
class Pretrained:
    """What fine-tuning takes from a ``.nemo``.

    Attributes:
        path: the archive.
        architecture: ``conformer`` and the encoder's parts, without the run-time keys.
        weights: the encoder's tensors, named as in ``SLAMEncoder`` and ``SLAMTextEncoder``.
        preprocessor: for speech: the features that the encoder was trained on.
        tokenizer: for text: the SentencePiece model that it was trained with.
    """

    path: Path
    architecture: dict[str, dict[str, Any]]
    weights: dict[str, Tensor]
    preprocessor: dict[str, Any] | None = None
    tokenizer: bytes | None = None

    def describe(self) -> str:
        layers = [str(node["num_layers"]) for node in self.architecture.values() if "num_layers" in node]
        width = self.architecture["conformer"].get("d_model")
        return f"width {width}, {' + '.join(layers)} layers, {len(self.weights)} tensors"


def read_pretrained(path: str | Path, kind: str = "speech") -> Pretrained:
    """Read an encoder out of a ``.nemo`` of ours: of pre-training, or of a model fine-tuned from it.

    Args:
        kind: ``speech`` or ``text``: which of the two front ends is wanted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a NeMo archive, or none with such an encoder.
    """
    path = Path(path)
    try:
        config = read_config(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"init_from: {error}") from error
    node = config.get("encoder", config)
    parts = ("conformer", *PARTS[kind])
    if not isinstance(node, dict) or any(not isinstance(node.get(part), dict) for part in parts):
        raise ValueError(
            f"init_from: {path} ({config.get('target', 'unknown class')}) has no SLAM {kind} encoder: expected a .nemo "
            f"of scripts/speech_pretrain.py, or of scripts/speech_finetune.py with {kind} in"
        )
    architecture = {part: dict(node[part]) for part in parts}
    architecture["conformer"] = {k: v for k, v in architecture["conformer"].items() if k not in RUN_TIME}
    weights = encoder_weights(read_weights(path), kind)
    if kind == "text":
        return Pretrained(path, architecture, weights, tokenizer=read_tokenizer(path, config))
    if not isinstance(config.get("preprocessor"), dict):
        raise ValueError(f"init_from: {path} has no preprocessor, so its features are unknown")
    preprocessor = {**config["preprocessor"], "_target_": PREPROCESSOR, "dither": 0.0, "pad_to": 0}
    return Pretrained(path, architecture, weights, preprocessor=preprocessor)


def encoder_weights(weights: Mapping[str, Tensor], kind: str = "speech") -> dict[str, Tensor]:
    """The encoder's tensors among a model's, under the names that it gives them itself."""
    # An encoder that was fine-tuned on pairs of texts has a separator, which the next task on pairs goes on with.
    prefixes = (*(f"{part}." for part in PARTS[kind]), *(("separator",) if kind == "text" else ()))
    names = {name: name.removeprefix("encoder.") for name in weights}
    return {short: weights[name] for name, short in names.items() if short.startswith(prefixes)}


def encoder_node(node: Mapping[str, Any], pretrained: Pretrained | None, target: str = ENCODER) -> dict[str, Any]:
    """The encoder's config: what shapes weights comes from the file if there is one, the rest from ``node``.

    Args:
        node: ``model.encoder`` of the fine-tuning config.
        target: the encoder's class.
    """
    conformer = dict(node["conformer"])
    if pretrained is not None:
        conformer = {**pretrained.architecture["conformer"], **{k: v for k, v in conformer.items() if k in RUN_TIME}}
        node = {**node, **pretrained.architecture}
    return {**node, "conformer": conformer, "d_model": conformer["d_model"], "_target_": target}


def initialise_encoder(
    encoder: nn.Module, pretrained: Pretrained, minimum: float, reinit_last_layers: int = 0
) -> LoadReport:
    """Copy the weights and account for them.

    Args:
        encoder: with its random weights.
        minimum: share of the encoder's parameters that the file must have.
        reinit_last_layers: of the multimodal layers, so many from the last keep their random weights: the last ones
            hold most of what pre-training was about (Zhang et al., 2021, "Revisiting Few-sample BERT
            Fine-tuning"; of speech: Pasad et al., 2021, "Layer-wise Analysis of a Self-supervised Speech Representation
            Model").

    Raises:
        ValueError: less than ``minimum`` was loaded, or there are not so many layers.
    """
    layers = list(encoder.get_submodule("multimodal_encoder.layers").children())
    if not isinstance(reinit_last_layers, int) or not 0 <= reinit_last_layers <= len(layers):
        raise ValueError(f"reinit_last_layers must be 0 to {len(layers)}, the multimodal layers: {reinit_last_layers}")
    last = layers[len(layers) - reinit_last_layers :]
    random = [copy.deepcopy(layer.state_dict()) for layer in last]
    report = load_weights(encoder, pretrained.weights, pretrained.path, minimum)
    for layer, own in zip(last, random, strict=True):
        layer.load_state_dict(own)
    return report
