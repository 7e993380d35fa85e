"""Noise on masked speech's input; the targets stay those of the clean audio (NEST, Huang et al., 2024, 2408.13106).

NEST and NeMo mix in noise recordings and other utterances of the batch, at an energy ratio, over a stretch of the
utterance. Here the noise is Gaussian, coloured, and a function of (seed, epoch, example) like every other draw: an
utterance is augmented alike alone and in any batch, and a resumed run as an unbroken one.

Shape legend: B utterances, T samples (padded), N rows of noise.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_slam.data.batch import SpeechBatch
from nemo_slam.data.sampling import keyed_words
from nemo_slam.packing import to_device
from nemo_slam.randomness import Randomness
from slam_kernels import apply_spans

ROW = 160
"""Samples of a row of noise: stretches begin and end on multiples of 10 ms."""
TAPS = 64
MAX_COLOUR = 0.95
"""Noise is filtered by colour ** k over TAPS samples: 0 is white, 0.95 falls above some 130 Hz."""


@dataclass(frozen=True)
class AugmentationConfig:
    """NEST's shares and ratios.

    Attributes:
        probability: of an utterance to be augmented, in training.
        min_snr, max_snr: mean energy of the utterance over that of the noise where there is any, dB, uniform.
        min_share, max_share: of the utterance that one stretch of noise covers, uniform.
    """

    probability: float = 0.2
    min_snr: float = -5.0
    max_snr: float = 20.0
    min_share: float = 0.5
    max_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {self.probability}")
        if not 0 < self.min_share <= self.max_share <= 1:
            raise ValueError(f"0 < min_share <= max_share <= 1 must hold, got {self.min_share} and {self.max_share}")
        if not self.min_snr <= self.max_snr:
            raise ValueError(f"min_snr ({self.min_snr}) is above max_snr ({self.max_snr})")


@dataclass(frozen=True)
class NoisePlan:
    """What each utterance gets, (B,) each: a stretch of rows, none where ``size`` is 0, its SNR (dB) and its colour."""

    start: np.ndarray
    size: np.ndarray
    snr: np.ndarray
    colour: np.ndarray


def plan_noise(batch: SpeechBatch, config: AugmentationConfig, seed: int) -> NoisePlan:
    """A function of each example's (id, epoch) and length, and of the seed."""
    ids, epochs = batch.ids.numpy(), batch.epochs.numpy()

    def uniform(draw: int) -> np.ndarray:
        words = keyed_words(ids, epochs, seed=seed, purpose=zlib.crc32(b"augmentation"), draw=draw)
        return (words >> np.uint64(11)) * 2.0**-53

    rows = -(-batch.audio_lengths.numpy() // ROW)
    share = config.min_share + (config.max_share - config.min_share) * uniform(1)
    size = np.minimum(np.maximum(np.rint(share * rows), 1), rows).astype(np.int64)
    size[uniform(0) >= config.probability] = 0
    return NoisePlan(
        start=np.floor(uniform(2) * (rows - size + 1)).astype(np.int64),
        size=size,
        snr=config.min_snr + (config.max_snr - config.min_snr) * uniform(3),
        colour=MAX_COLOUR * uniform(4),
    )


@torch.no_grad()
def add_noise(batch: SpeechBatch, config: AugmentationConfig, randomness: Randomness, backend: str) -> SpeechBatch:
    """The batch with noise in its audio."""
    plan, audio = plan_noise(batch, config, randomness.seed), batch.audio
    if not plan.size.any():
        return batch
    device, width = audio.device, audio.shape[1]
    with torch.autocast(device.type, enabled=False):
        noise = _coloured(_white(plan, batch, width, randomness, backend), to_device(plan.colour, device, audio.dtype))
        lengths = batch.audio_lengths.to(device)
        noise = noise.masked_fill(torch.arange(width, device=device) >= lengths[:, None], 0.0)
        begin = to_device(plan.start, device) * ROW
        covered = (torch.minimum(begin + to_device(plan.size, device) * ROW, lengths) - begin).clamp(min=1)
        speech_energy = audio.square().sum(dim=1) / lengths
        noise_energy = noise.square().sum(dim=1) / covered
        wanted = speech_energy * to_device(10.0 ** (-plan.snr / 10), device, audio.dtype)
        scale = (wanted / noise_energy.clamp(min=torch.finfo(audio.dtype).tiny)).sqrt()
        return replace(batch, audio=audio + scale[:, None] * noise)


def _white(plan: NoisePlan, batch: SpeechBatch, width: int, randomness: Randomness, backend: str) -> Tensor:
    """Gaussian noise in each utterance's stretch, zero elsewhere. *Shape:* (B, T)."""
    audio, some = batch.audio, np.flatnonzero(plan.size)
    cu_seqlens = np.concatenate([[0], np.cumsum(plan.size[some])])
    total = int(cu_seqlens[-1])
    rows, _ = apply_spans(
        audio.new_zeros(total, ROW),
        torch.ones(total, dtype=torch.bool, device=audio.device),
        to_device(cu_seqlens, audio.device, torch.int32),
        batch.ids[some].to(audio.device),
        batch.epochs[some].to(audio.device),
        key=randomness.key("augmentation"),
        vector=None,
        std=1.0,
        backend=backend,
    )
    slots = -(-width // ROW)
    places = np.concatenate([u * slots + np.arange(plan.start[u], plan.start[u] + plan.size[u]) for u in some])
    noise = audio.new_zeros(len(audio) * slots, ROW)
    noise[to_device(places, audio.device)] = rows
    return noise.view(len(audio), slots * ROW)[:, :width]


def _coloured(white: Tensor, colour: Tensor) -> Tensor:
    """Each row of (B, T) filtered by its own taps, colour ** k for the sample k before."""
    taps = colour[:, None] ** torch.arange(TAPS - 1, -1, -1, device=colour.device)
    return F.conv1d(F.pad(white, (TAPS - 1, 0))[None], taps[:, None], groups=len(white))[0]
