"""Typed batches: what the loader hands to the model, one micro-batch at a time.

Shapes: B examples, T samples (padded), N tokens end to end (packed).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

# Lengths and identities are read on the CPU (the model plans its packed layout there, without a device sync).
_CPU_FIELDS = frozenset({"audio_lengths", "lengths", "negative_lengths", "text_classes", "ids", "epochs"})


@dataclass
class _Tensors:
    """Moves and pins the tensor fields of a dataclass."""

    def to(self, device: torch.device | str, non_blocking: bool = False):
        """A copy with audio and tokens on `device`; lengths, ids and epochs stay on the CPU."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if f.name not in _CPU_FIELDS
        }
        return replace(self, **moved)

    def pin_memory(self):
        """A copy whose audio and tokens lie in page-locked memory, for an asynchronous copy to the device."""
        pinned = {f.name: getattr(self, f.name).pin_memory() for f in fields(self) if f.name not in _CPU_FIELDS}
        return replace(self, **pinned)

    def __len__(self) -> int:
        """Number of examples B."""
        return len(self.ids)  # type: ignore[attr-defined]


@dataclass
class SpeechBatch(_Tensors):
    """Utterances without text, sorted by length, longest last.

    *Shape:*
        - audio: (B, T) float32, 16 kHz mono, zero-padded on the right
        - audio_lengths: (B,) int64, in samples
        - ids: (B,) int64, unique within the stream and stable between runs
        - epochs: (B,) int64
    """

    audio: torch.Tensor
    audio_lengths: torch.Tensor
    ids: torch.Tensor
    epochs: torch.Tensor


@dataclass
class TextBatch(_Tensors):
    """Token sequences without speech, end to end, sorted by length, longest last.

    *Shape:*
        - tokens: (N,) int64, N = lengths.sum()
        - lengths: (B,) int64, in tokens
        - ids, epochs: (B,) int64
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    ids: torch.Tensor
    epochs: torch.Tensor


@dataclass
class PairBatch(_Tensors):
    """Transcribed utterances, each with its own text and one that belongs to another utterance; sorted by audio length.

    *Shape:*
        - audio: (B, T) float32, 16 kHz mono, zero-padded on the right
        - audio_lengths: (B,) int64, in samples
        - tokens: (N,) int64 end to end, N = lengths.sum()
        - lengths: (B,) int64, in tokens
        - negative_tokens: (N',) int64 end to end, N' = negative_lengths.sum()
        - negative_lengths: (B,) int64, in tokens
        - text_classes: (B,) int64, equal where two texts of the stream count as equal
        - ids, epochs: (B,) int64
    """

    audio: torch.Tensor
    audio_lengths: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    negative_tokens: torch.Tensor
    negative_lengths: torch.Tensor
    text_classes: torch.Tensor
    ids: torch.Tensor
    epochs: torch.Tensor


@dataclass
class StepBatch:
    """One rank's share of one micro-batch.

    `step` is the micro-batch number (see `nemo_slam.data.loader`). A stream that the stage does not have is None;
    a stream that has nothing for this rank this time is a batch of B = 0.
    """

    step: int
    speech: SpeechBatch | None = None
    text: TextBatch | None = None
    pairs: PairBatch | None = None

    def _map(self, method: str, *args) -> StepBatch:
        def apply(batch):
            return None if batch is None else getattr(batch, method)(*args)

        return replace(self, speech=apply(self.speech), text=apply(self.text), pairs=apply(self.pairs))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """A copy with audio and tokens on `device`; lengths, ids and epochs stay on the CPU."""
        return self._map("to", device, non_blocking)

    def pin_memory(self) -> StepBatch:
        """Called by torch's DataLoader when `pin_memory=True`."""
        return self._map("pin_memory")
