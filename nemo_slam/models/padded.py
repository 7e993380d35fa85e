"""The encoder over padded batches, in plain tensor operations: for exporters, which cannot plan a packed layout.

It shares the packed encoder's modules and equals it on the valid frames: padding is masked wherever it could reach
them, in the front end, the keys of attention, the convolution and the statistics of its GroupNorm.

Shapes: B utterances, T frames, T' = ceil(T / 4), D width, F mel bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_slam.models.encoder import SLAMEncoder
from nemo_slam.modules.conformer import PackedConformerLayer
from nemo_slam.modules.positions import rotary_angles, rotate


def valid(length: Tensor, width: int | torch.SymInt) -> Tensor:
    """*Shape:* (B,) -> (B, width) bool, True before each length."""
    return torch.arange(width, device=length.device) < length[:, None]  # type: ignore[arg-type]


def subsample(encoder: SLAMEncoder, features: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The front end. *Shape:* (B, F, T) and (B,) -> (B, T', D) and (B,)."""
    front = encoder.speech_encoder.pre_encode
    image = features.transpose(1, 2).unsqueeze(1)
    for convolution, activation in ((front.conv[0], front.conv[1]), (front.conv[2], front.conv[3])):
        # Not multiplied by 0: NaN would stay NaN, and reach the last valid frames.
        image = image.masked_fill(~valid(length, image.shape[2])[:, None, :, None], 0.0)
        image = activation(convolution(image))
        length = torch.div(length + 1, 2, rounding_mode="floor")
    return front.out(image.transpose(1, 2).flatten(2)), length


def attend(layer: PackedConformerLayer, x: Tensor, mask: Tensor) -> Tensor:
    """Self-attention over valid keys. *Shape:* (B, T', D) and (B, T') -> (B, T', D)."""
    attention = layer.self_attn
    q, k, v = (
        linear(x).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
        for linear in (attention.linear_q, attention.linear_k, attention.linear_v)
    )
    if attention.rotary:
        angles = rotary_angles(torch.arange(x.shape[1], device=x.device), q.shape[-1])
        q, k = rotate(q, *angles), rotate(k, *angles)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    return attention.linear_out(out.transpose(1, 2).flatten(2))


def convolve(layer: PackedConformerLayer, x: Tensor, mask: Tensor) -> Tensor:
    """The convolution module, its statistics over valid frames. *Shape:* (B, T', D) and (B, T') -> (B, T', D)."""
    module, norm = layer.conv, layer.conv.batch_norm
    keep = mask[:, None, :].to(x.dtype)
    rows = F.glu(module.pointwise_conv1(x.transpose(1, 2)), dim=1) * keep
    kernel = module.depthwise_conv
    rows = F.conv1d(rows, kernel.weight, kernel.bias, padding=kernel.kernel_size[0] // 2, groups=rows.shape[1])
    grouped = rows.unflatten(1, (norm.num_groups, -1))
    keep = keep[:, None]
    count = keep.sum(dim=(2, 3), keepdim=True).clamp(min=1) * grouped.shape[2]
    mean = (grouped * keep).sum(dim=(2, 3), keepdim=True) / count
    centred = grouped - mean
    variance = (centred.square() * keep).sum(dim=(2, 3), keepdim=True) / count
    rows = (centred * torch.rsqrt(variance + norm.eps)).flatten(1, 2)
    rows = F.silu(rows * norm.weight[:, None] + norm.bias[:, None])
    return module.pointwise_conv2(rows).transpose(1, 2)


def run_layer(layer: PackedConformerLayer, x: Tensor, mask: Tensor) -> Tensor:
    """NeMo's Conformer layer without dropout. *Shape:* (B, T', D) and (B, T') -> (B, T', D)."""
    x = x + layer.feed_forward1(layer.norm_feed_forward1(x)) * layer.fc_factor
    x = x + attend(layer, layer.norm_self_att(x), mask)
    x = x + convolve(layer, layer.norm_conv(x), mask)
    x = x + layer.feed_forward2(layer.norm_feed_forward2(x)) * layer.fc_factor
    return layer.norm_out(x)


class PaddedEncoder(nn.Module):
    """``SLAMEncoder.forward`` for evaluation, over padded batches.

    Args:
        encoder: whose modules are shared.
    """

    def __init__(self, encoder: SLAMEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """*Shape:* log-mel (B, F, T), frames (B,) -> (B, D, T'), padding zero, and lengths (B,)."""
        x, length = subsample(self.encoder, audio_signal, length)
        mask = valid(length, x.shape[1])
        for layer in self.encoder.speech_encoder.layers:
            x = run_layer(layer, x, mask)  # type: ignore[arg-type]
        x = self.encoder.speech_encoder.proj(x)
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        x = self.encoder.multimodal_encoder.embed_speech(x.flatten(0, 1), positions.reshape(-1)).view_as(x)
        for layer in self.encoder.multimodal_encoder.layers:
            x = run_layer(layer, x, mask)  # type: ignore[arg-type]
        x = x.masked_fill(~mask[:, :, None], 0.0)  # an utterance without a frame attended to nothing: it may be NaN
        return x.transpose(1, 2), length
