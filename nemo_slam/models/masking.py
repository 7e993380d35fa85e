"""Masks of a step: where they fall, and what stands in the place of what they cover.

Shape legend: N packed rows, S sequences, M masked rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_slam.data.batch import StepBatch
from nemo_slam.modules.text_encoder import TextEncoder
from nemo_slam.objectives.inputs import SpeechInput, SpeechMasking, TextInput, TokenMasking
from nemo_slam.packing import PackedSequences, to_device
from nemo_slam.randomness import INPUT_SHIFT, STREAM_SHIFT, Randomness
from slam_kernels import apply_spans, corrupt_tokens, sample_spans

STREAMS = ("speech", "text", "pairs")


@dataclass(frozen=True)
class MaskVectorConfig:
    """What replaces a masked frame (w2v-BERT: random vectors).

    Attributes:
        kind: ``random`` (fresh Gaussian vectors) or ``learned`` (one vector).
        std: standard deviation of the random vectors.
    """

    kind: str = "random"
    std: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("random", "learned"):
            raise ValueError(f"mask_vector.kind: {self.kind!r} is not one of random, learned")


@dataclass(frozen=True)
class CorruptionConfig:
    """What replaces a masked token (BERT).

    Attributes:
        mask: share that becomes [MASK].
        random: share that becomes any piece of the vocabulary; what is left of 1 stays the true token.
    """

    mask: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if not (self.mask >= 0 and self.random >= 0 and round(self.mask + self.random, 9) <= 1):
            raise ValueError(f"mask and random are shares whose sum is at most 1, got {self.mask} and {self.random}")


@dataclass
class MaskedRows:
    """What a loss on masked positions needs.

    *Shape:* ``index`` (M,) rows within the packed layout of their encoder, ascending; ``cu_seqlens`` (S + 1,),
    ``ids`` (S,) and ``epochs`` (S,) of that layout, ids -1 where the sequence is not this input's.
    """

    index: Tensor
    cu_seqlens: Tensor
    ids: Tensor
    epochs: Tensor

    @property
    def where(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the keyed samplers of ``slam_kernels`` take."""
        return self.index, self.cu_seqlens, self.ids, self.epochs

    def sequences_below(self, rows: int) -> tuple[Tensor, Tensor]:
        """How many sequences the input has, and how many of them with fewer masked rows than that."""
        sequence = torch.searchsorted(self.cu_seqlens.long(), self.index, right=True) - 1
        masked = torch.zeros_like(self.ids).index_add(0, sequence, torch.ones_like(sequence))
        own = self.ids >= 0
        return own.sum(), (own & (masked < rows)).sum()


def _identities(packed: PackedSequences, name: str, stream: str, batch: StepBatch) -> tuple[Tensor, Tensor]:
    """Example ids, unique over streams, and epochs (S,) of an input's sequences; ids are -1 elsewhere."""
    examples = getattr(batch, stream)
    ids = packed.per_sequence(name, examples.ids.numpy() + (STREAMS.index(stream) << STREAM_SHIFT))
    epochs = packed.per_sequence(name, examples.epochs.numpy(), fill=0)
    device = packed.gather.device
    return to_device(ids, device), to_device(epochs, device)


@dataclass
class Masks:
    """Span masks of the inputs that ask for them, over one layout. *Shape:* mask (N,) bool; ids, epochs (S,)."""

    packed: PackedSequences
    inputs: list[SpeechInput | TextInput]
    masks: list[Tensor]
    identities: list[tuple[Tensor, Tensor]]

    def union(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mask, cu_seqlens, ids, epochs over all inputs, which never share a sequence.

        One pass replaces what all of them mask, with one key: so the input goes into the id, lest two inputs of one
        example draw the same words.
        """
        draws = [request.draw << INPUT_SHIFT for request in self.inputs]
        apart = [torch.where(ids >= 0, ids + draw, ids) for (ids, _), draw in zip(self.identities, draws, strict=True)]
        ids = torch.stack(apart).amax(dim=0)
        epochs = torch.stack([epochs for _, epochs in self.identities]).amax(dim=0)
        return torch.stack(self.masks).any(dim=0), self.packed.layout.cu_seqlens, ids, epochs

    def split(self, index: Tensor) -> dict[str, MaskedRows]:
        """Cut the ascending index of all masked rows where the inputs meet (they are contiguous): one sync for all."""
        counts = torch.stack([mask.sum() for mask in self.masks]).tolist()
        cu_seqlens = self.packed.layout.cu_seqlens
        parts = zip(self.inputs, index.split(counts), self.identities, strict=True)
        return {request.name: MaskedRows(part, cu_seqlens, ids, epochs) for request, part, (ids, epochs) in parts}


def sample_masks(
    packed: PackedSequences,
    inputs: Sequence[SpeechInput] | Sequence[TextInput],
    batch: StepBatch,
    randomness: Randomness,
    kernels: str,
) -> Masks | None:
    sampled = Masks(packed, [], [], [])
    for request in inputs:
        masking = request.masking
        if masking is None:
            continue
        ids, epochs = _identities(packed, request.name, request.stream, batch)
        mask = sample_spans(
            packed.layout.cu_seqlens,
            ids,
            epochs,
            key=randomness.key(f"spans/{request.name}"),
            span=masking.span,
            start_probability=masking.start_probability if isinstance(masking, SpeechMasking) else None,
            rate=masking.rate if isinstance(masking, TokenMasking) else None,
            num_rows=packed.layout.num_rows,
            backend=kernels,
        )
        sampled.inputs.append(request)
        sampled.masks.append(mask)
        sampled.identities.append((ids, epochs))
    return sampled if sampled.inputs else None


def mask_speech(
    rows: Tensor, masks: Masks | None, randomness: Randomness, kernels: str, vector: Tensor | float
) -> tuple[Tensor, dict[str, MaskedRows]]:
    if masks is None:
        return rows, {}
    mask, cu_seqlens, ids, epochs = masks.union()
    learned, std = (vector, 0.0) if isinstance(vector, Tensor) else (None, vector)
    rows, index = apply_spans(
        rows,
        mask,
        cu_seqlens,
        ids,
        epochs,
        key=randomness.key("mask_vectors"),
        vector=learned,
        std=std,
        backend=kernels,
    )
    return rows, masks.split(index)


def mask_text(
    tokens: Tensor,
    masks: Masks | None,
    randomness: Randomness,
    kernels: str,
    text_encoder: TextEncoder,
    corruption: CorruptionConfig,
) -> tuple[Tensor, dict[str, MaskedRows]]:
    if masks is None:
        return tokens, {}
    mask, cu_seqlens, ids, epochs = masks.union()
    tokens, index = corrupt_tokens(
        tokens,
        mask,
        cu_seqlens,
        ids,
        epochs,
        key=randomness.key("corruption"),
        mask_id=text_encoder.mask_id,
        vocab_size=text_encoder.num_pieces,
        mask_probability=corruption.mask,
        random_probability=corruption.random,
        backend=kernels,
    )
    return tokens, masks.split(index)
