"""The pre-trained encoder as a drop-in NeMo encoder: speech in, frames out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from nemo.core.classes import Exportable, NeuralModule, typecheck
from nemo.core.neural_types import AcousticEncodedRepresentation, LengthsType, NeuralType, SpectrogramType
from omegaconf import OmegaConf
from torch import Tensor

from nemo_slam.config import parse
from nemo_slam.models.settings import EncoderSettings
from nemo_slam.modules.multimodal_encoder import MultimodalEncoder
from nemo_slam.modules.speech_encoder import SUBSAMPLING_FACTOR, SpeechEncoder, subsampled_lengths
from nemo_slam.packing import Segments, gather_rows, pack, row_multiple, to_device

NOT_TRACED = (
    "SLAMEncoder plans a batch from its lengths, which a trace would keep for ever as those of its example: use "
    "scripts/export_nemo.py --to onnx-encoder or onnx-ctc"
)


class SLAMEncoder(NeuralModule, Exportable):
    """Speech encoder and multimodal encoder of SLAM, as the ``encoder`` of stock NeMo CTC, RNN-T and attention models.

    Parameter names are those of ``nemo_slam.models.pretraining.SLAMPretrainingModel``, so that its weights load as
    they are. Keys of the config node: ``nemo_slam.models.settings.EncoderSettings``, and ``d_model``, a copy of
    ``conformer.d_model`` where NeMo's attention models look for it.
    """

    def __init__(self, **node: Any):
        super().__init__()
        node = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in node.items()}
        width = node.pop("d_model", None)
        settings = parse(EncoderSettings, node, "encoder")
        if width not in (None, settings.conformer.d_model):
            raise ValueError(f"encoder.d_model is {width}, but conformer.d_model {settings.conformer.d_model}")
        self.speech_encoder = SpeechEncoder(settings.speech_encoder, settings.conformer)
        self.multimodal_encoder = MultimodalEncoder(settings.multimodal_encoder, settings.conformer)
        # The CLS vector belongs to pairs. As a buffer it keeps its name and value, and is no parameter that DDP would
        # miss a gradient for, nor one that NeMo's unfreeze() could switch on.
        cls = self.multimodal_encoder.cls.detach().clone()
        del self.multimodal_encoder.cls
        self.multimodal_encoder.register_buffer("cls", cls)
        self.pad_multiple = settings.pad_multiple
        self.d_model = settings.conformer.d_model
        self._feat_in = settings.speech_encoder.feat_in
        self._feat_out = settings.conformer.d_model
        self.subsampling_factor = SUBSAMPLING_FACTOR

    @property
    def input_types(self) -> OrderedDict[str, NeuralType]:
        return OrderedDict(
            audio_signal=NeuralType(("B", "D", "T"), SpectrogramType()), length=NeuralType(tuple("B"), LengthsType())
        )

    @property
    def output_types(self) -> OrderedDict[str, NeuralType]:
        return OrderedDict(
            outputs=NeuralType(("B", "D", "T"), AcousticEncodedRepresentation()),
            encoded_lengths=NeuralType(tuple("B"), LengthsType()),
        )

    @typecheck()
    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """*Shape:* log-mel (B, F, T), frames (B,) -> (B, D, T'), padding zero, and lengths (B,); T' = ceil(T / 4)."""
        if torch.jit.is_tracing():
            raise NotImplementedError(NOT_TRACED)
        frames = np.minimum(length.cpu().numpy(), audio_signal.shape[-1])
        rows = self.speech_encoder.subsample(audio_signal, frames)
        lengths = subsampled_lengths(frames)
        starts = np.cumsum(lengths) - lengths
        segments = {"speech": Segments(starts[:, None], lengths[:, None])}
        packed = pack(segments, len(rows), rows.device, row_multiple(self.pad_multiple, rows.device))
        _, projected = self.speech_encoder(gather_rows(rows, packed.gather), packed.layout)
        hidden = self.multimodal_encoder.embed_speech(projected, packed.layout.positions)
        hidden = self.multimodal_encoder(hidden, packed.layout)

        width = int(lengths.max(initial=0))
        place = np.full((len(lengths), width), len(hidden), np.int64)
        place[np.arange(width) < lengths[:, None]] = packed.rows_of("speech", 0)
        padded = gather_rows(hidden, to_device(place.reshape(-1), hidden.device))
        padded = padded.view(len(lengths), width, self.d_model)
        return padded.transpose(1, 2), to_device(lengths, length.device)

    def _prepare_for_export(self, **options: Any) -> None:
        """NeMo's ``export()`` calls it, of a model's encoder too, before it traces; by then it has frozen the model."""
        raise NotImplementedError(NOT_TRACED)
