"""The pre-trained encoder for text: tokens in, rows out. NeMo has no such encoder."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nemo.core.classes import NeuralModule
from nemo.core.neural_types import ChannelType, LabelsType, LengthsType, NeuralType
from omegaconf import OmegaConf
from torch import Tensor, nn

from nemo_slam.config import parse
from nemo_slam.modules.conformer import ConformerConfig
from nemo_slam.modules.multimodal_encoder import MultimodalEncoder, MultimodalEncoderConfig
from nemo_slam.modules.text_encoder import TextEncoder, TextEncoderConfig
from nemo_slam.packing import Segments, gather_rows, pack, row_multiple


@dataclass(frozen=True)
class TextEncoderSettings:
    """Attributes:
    pad_multiple: packed rows are rounded up to a multiple of this, but on a CPU.
    cls: put the CLS row first, which pre-training puts before pairs.
    texts: texts in a sequence, 1 or 2; a learned separator stands between two.
    """

    conformer: ConformerConfig = field(default_factory=ConformerConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    multimodal_encoder: MultimodalEncoderConfig = field(default_factory=MultimodalEncoderConfig)
    pad_multiple: int = 16
    cls: bool = False
    texts: int = 1

    def __post_init__(self) -> None:
        if self.texts not in (1, 2):
            raise ValueError(f"texts: {self.texts} is neither 1 nor 2")


class SLAMTextEncoder(NeuralModule):
    """Text encoder and multimodal encoder of SLAM over packed rows, for models that read text.

    Parameter names are those of ``nemo_slam.models.pretraining.SLAMPretrainingModel``. Positions go on over the
    separator, so that the second text is told from the first [?].
    """

    def __init__(self, **node: Any):
        super().__init__()
        node = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in node.items()}
        width = node.pop("d_model", None)
        settings = parse(TextEncoderSettings, node, "encoder")
        self.d_model = settings.conformer.d_model
        if width not in (None, self.d_model):
            raise ValueError(f"encoder.d_model is {width}, but conformer.d_model {self.d_model}")
        self.settings = settings
        self.text_encoder = TextEncoder(settings.text_encoder, self.d_model)
        self.multimodal_encoder = MultimodalEncoder(settings.multimodal_encoder, settings.conformer)
        if not settings.cls:  # a buffer keeps name and value, and is no parameter that DDP would miss a gradient for
            cls = self.multimodal_encoder.cls.detach().clone()
            del self.multimodal_encoder.cls
            self.multimodal_encoder.register_buffer("cls", cls)
        separator = torch.randn(1, self.d_model) * self.d_model**-0.5
        self.separator = nn.Parameter(separator) if settings.texts == 2 else None

    @property
    def input_types(self) -> OrderedDict[str, NeuralType]:
        return OrderedDict(tokens=NeuralType(("B", "T"), LabelsType()), lengths=NeuralType(("B", "D"), LengthsType()))

    @property
    def output_types(self) -> OrderedDict[str, NeuralType]:
        return OrderedDict(
            outputs=NeuralType(("B", "T", "D"), ChannelType()), encoded_lengths=NeuralType(tuple("B"), LengthsType())
        )

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """*Shape:* tokens (B, U), a row's k texts end to end, and their lengths (B, k) -> (B, U', D), padding zero, and
        lengths (B,). U' counts the CLS row and the separator where there are such."""
        sizes = lengths.cpu().numpy().astype(np.int64)
        batch, texts = sizes.shape
        if texts != self.settings.texts:
            raise ValueError(
                f"lengths (B, k) say {texts} texts in a row, the encoder was built for {self.settings.texts}"
            )
        device, columns = tokens.device, np.arange(tokens.shape[1])
        total = sizes.sum(axis=1)
        kept = columns < total[:, None]
        after_separator = (columns >= sizes[:, :1]) & (texts == 2)
        positions = torch.as_tensor((columns + after_separator)[kept]).to(device)
        chosen = tokens.flatten().index_select(0, torch.as_tensor(np.flatnonzero(kept)).to(device))
        rows = self.multimodal_encoder.embed_text(self.text_encoder(chosen, positions))
        fixed = [self.multimodal_encoder.cls, *([] if self.separator is None else [self.separator])]
        source = torch.cat([*(row.to(rows.dtype) for row in fixed), rows])

        begin = len(fixed) + np.cumsum(total) - total
        zero, one = np.zeros(batch, np.int64), np.ones(batch, np.int64)
        parts = [(zero, one * self.settings.cls), (begin, sizes[:, 0])]
        if texts == 2:
            parts += [(one, one), (begin + sizes[:, 0], sizes[:, 1])]
        starts, widths = zip(*parts, strict=True)
        segments = Segments(np.stack(starts, axis=1), np.stack(widths, axis=1))
        packed = pack({"text": segments}, len(source), device, row_multiple(self.settings.pad_multiple, device))
        hidden = self.multimodal_encoder(gather_rows(source, packed.gather), packed.layout)

        ends = segments.lengths.sum(axis=1)
        width = int(ends.max(initial=0))
        index = np.full((batch, width), len(hidden), np.int64)
        place = packed.starts["text"][:, :1]
        valid = np.arange(width) < ends[:, None]
        index[valid] = (place + np.arange(width))[valid]
        padded = gather_rows(hidden, torch.as_tensor(index.reshape(-1)).to(device)).view(batch, width, self.d_model)
        return padded, torch.as_tensor(ends).to(lengths.device)
