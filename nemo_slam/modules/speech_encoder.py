"""Speech encoder: convolutional front end (4x fewer frames), N Conformer layers, one linear projection (SLAM, section
3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling
from torch import Tensor, nn

from nemo_slam.modules.conformer import ConformerConfig, ConformerStack
from nemo_slam.packing import SequenceLayout, ranges, to_device

SUBSAMPLING_FACTOR = 4


def subsampled_lengths(lengths: np.ndarray) -> np.ndarray:
    """Frames left by two convolutions of stride 2: ceil(ceil(L / 2) / 2)."""
    return -(-np.asarray(lengths, np.int64) // 4)


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """Attributes:
    feat_in: mel channels.
    conv_channels: channels of the two 2-D convolutions (unknown in the paper).
    num_layers: Conformer layers before the projection (N).
    """

    feat_in: int = 80
    conv_channels: int = 128
    num_layers: int = 8


def lay_in_lines(slots: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Lay slots end to end in lines as long as the longest, the longest first, each where it fits first.

    *Shape:* slots (B,) -> starts (B,) in lines laid end to end; number of lines, and their length.

    >>> lay_in_lines(np.array([8, 4, 12, 4]))
    (array([12, 20,  0, 24]), 3, 12)
    """
    width = int(slots.max(initial=4))
    starts = np.zeros(len(slots), np.int64)
    free = np.full(len(slots), width, np.int64)
    for i in np.argsort(-slots, kind="stable"):
        line = int(np.argmax(free >= slots[i]))
        starts[i] = (line + 1) * width - free[line]
        free[line] -= slots[i]
    return starts, max(int((free < width).sum()), 1), width


class PackedConvSubsampling(ConvSubsampling):
    """NeMo's ``ConvSubsampling("striding")`` on utterances laid end to end in the lines of an image.

    Each utterance starts on a multiple of 4 frames and at least 3 zero frames follow it, so that no 3 x 3 kernel of
    stride 2 reaches a neighbour; what the first convolution leaves in those gaps is zeroed before the second. The
    result equals NeMo's on each utterance alone, and hardly any padding is computed.
    """

    def __init__(self, feat_in: int, d_model: int, conv_channels: int):
        device = torch.empty(0).device
        with torch.device("cpu"):  # NeMo's constructor computes with a tensor, which the meta device cannot
            super().__init__("striding", SUBSAMPLING_FACTOR, feat_in, d_model, conv_channels)
        self.to(device)

    def forward(self, features: Tensor, lengths: np.ndarray) -> Tensor:
        """*Shape:* features (B, F, T), lengths (B,) frames -> rows (sum of subsampled lengths, D)."""
        lengths = np.asarray(lengths, np.int64)
        batch, mels, width = features.shape
        starts, lines, slots = lay_in_lines((lengths + 3 + 3) // 4 * 4)
        total = lines * slots

        frames = np.full(total, batch * width, np.int64)
        frames[ranges(starts, lengths)] = ranges(np.arange(batch) * width, lengths)
        source = torch.cat([features.transpose(1, 2).reshape(-1, mels), features.new_zeros(1, mels)])
        image = source.index_select(0, to_device(frames, features.device)).view(lines, 1, slots, mels)

        first, activation, second, last = self.conv
        half_valid = np.zeros(total // 2, bool)
        half_valid[ranges(starts // 2, -(-lengths // 2))] = True
        line, column = (to_device(i, image.device) for i in np.nonzero(~half_valid.reshape(lines, -1)))
        image = first(image)
        with torch.no_grad():  # ReLU gives no gradient where its output is 0, so there is none to stop here
            image.transpose(1, 2)[line, column] = 0
        image = activation(image)
        image = last(second(image))
        kept = to_device(ranges(starts // 4, subsampled_lengths(lengths)), image.device)
        rows = image.transpose(1, 2).reshape(total // 4, -1).index_select(0, kept)
        return self.out(rows)


class SpeechEncoder(nn.Module):
    """Front end, Conformer layers and projection; masking happens between the first two (see ``objectives``)."""

    def __init__(self, config: SpeechEncoderConfig, conformer: ConformerConfig):
        super().__init__()
        self.pre_encode = PackedConvSubsampling(config.feat_in, conformer.d_model, config.conv_channels)
        self.layers = ConformerStack(conformer, config.num_layers)
        self.proj = nn.Linear(conformer.d_model, conformer.d_model)

    def subsample(self, features: Tensor, lengths: np.ndarray) -> Tensor:
        """Log-mel (B, F, T) -> one row for each 40 ms (sum of ceil(L / 4), D), utterances in order."""
        return self.pre_encode(features, lengths)

    def forward(self, rows: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Rows (N, D) -> contexts (N, D), which the contrastive loss reads, and their projection (N, D)."""
        contexts = self.layers(rows, layout)
        return contexts, self.proj(contexts)
