"""The encoder, or a CTC model, as ONNX: log-mel frames in, encoder frames or log-probabilities out.

Needs the extra ``onnx``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from nemo.collections.asr.models import EncDecCTCModelBPE
from torch import Tensor, nn

from nemo_slam.archive import read_config
from nemo_slam.finetuning.pretrained import ENCODER, encoder_node, initialise_encoder, read_pretrained
from nemo_slam.models.encoder import SLAMEncoder
from nemo_slam.models.padded import PaddedEncoder

OPSET = 18
PARTS = ("encoder", "ctc")


class PaddedCTC(nn.Module):
    """*Shape:* log-mel (B, F, T), frames (B,) -> log-probabilities (B, T', V + 1), blank last, and lengths (B,)."""

    def __init__(self, encoder: SLAMEncoder, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = PaddedEncoder(encoder), decoder

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        encoded, length = self.encoder(audio_signal, length)
        logits = self.decoder.decoder_layers(encoded)  # type: ignore[operator]
        return logits.transpose(1, 2).log_softmax(dim=-1), length


def load_encoder(source: str | Path) -> SLAMEncoder:
    """The encoder of a ``.nemo`` of pre-training or fine-tuning, alone."""
    pretrained = read_pretrained(source)
    node = encoder_node({"conformer": {}}, pretrained)
    del node["_target_"]
    encoder = SLAMEncoder(**node)
    initialise_encoder(encoder, pretrained, 1.0)
    return encoder


def onnx_module(source: str | Path, part: str) -> tuple[nn.Module, SLAMEncoder]:
    """What to export of a ``.nemo``, and the encoder in it.

    Raises:
        ValueError: an unknown part, no SLAM encoder, or CTC of a model that is not CTC.
    """
    if part not in PARTS:
        raise ValueError(f"{part!r} is not one of {', '.join(PARTS)}")
    if part == "encoder":
        encoder = load_encoder(source)
        return PaddedEncoder(encoder).eval(), encoder
    config = read_config(source)
    target, kind = str(config.get("target")), (config.get("encoder") or {}).get("_target_")
    if not target.startswith("nemo.collections.asr.models.ctc"):
        raise ValueError(f"{source} holds a {target}, which is no CTC model: only its encoder can be exported")
    if kind != ENCODER:
        raise ValueError(f"{source} has the encoder {kind}, not {ENCODER}: NeMo's own export() takes it")
    model = EncDecCTCModelBPE.restore_from(str(source), map_location="cpu")
    return PaddedCTC(model.encoder, model.decoder).eval(), model.encoder


def export_onnx(source: str | Path, part: str, out: str | Path) -> None:
    """Write ONNX with inputs ``audio_signal`` (B, F, T) float32 and ``length`` (B,) int64, B and T free.

    The features are those of the model's preprocessor, which is not part of the file.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise ValueError(f"{out}: the file must end in .onnx")
    module, encoder = onnx_module(source, part)
    out.parent.mkdir(parents=True, exist_ok=True)
    axes = {"audio_signal": {0: torch.export.Dim("batch"), 2: torch.export.Dim("time", min=2)}}
    example = (torch.randn(2, encoder._feat_in, 64), torch.tensor([64, 41]))
    torch.onnx.export(
        module,
        example,
        out,
        input_names=["audio_signal", "length"],
        output_names=["outputs" if part == "encoder" else "log_probs", "encoded_lengths"],
        dynamic_shapes={**axes, "length": {0: axes["audio_signal"][0]}},
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
