"""One step of pre-training: pack every objective's sequences, run each encoder once.

Shape legend: B utterances, T feature frames (padded input only), N packed rows, S sequences, M masked rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nemo_slam.data.batch import StepBatch
from nemo_slam.modules.multimodal_encoder import MultimodalEncoder
from nemo_slam.modules.speech_encoder import SUBSAMPLING_FACTOR, SpeechEncoder, subsampled_lengths
from nemo_slam.modules.text_encoder import TextEncoder
from nemo_slam.objectives.base import Objective
from nemo_slam.objectives.inputs import MultimodalInput, SpeechInput, SpeechMasking, TextInput, TokenMasking
from nemo_slam.packing import PackedSequences, Segments, gather_rows, pack, ranges
from nemo_slam.randomness import STREAM_SHIFT, Randomness
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


class Encoders(nn.Module):
    """The encoders that all objectives share. The pre-training model and the exported encoder name them alike."""

    speech_encoder: SpeechEncoder
    text_encoder: TextEncoder
    multimodal_encoder: MultimodalEncoder


@dataclass(frozen=True)
class StepSettings:
    """Attributes:
    kernels: ``torch`` or ``triton``, resolved.
    multiple: packed rows are rounded up to a multiple of this.
    max_positions: upper limit of packed rows in the multimodal encoder, or None.
    """

    kernels: str
    multiple: int = 1
    max_positions: int | None = None


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


@dataclass
class StepOutputs:
    """Everything an objective may read.

    Attributes:
        mel: log-mel (B, F, T) of the speech stream's utterances, then the pairs'.
        mel_lengths: (B,) their 10 ms frames, on the CPU.
        features: unmasked subsampled features in the speech layout (N_s, D).
        contexts: output of the speech encoder's layers (N_s, D).
        tokens: uncorrupted token ids in the text layout (N_t,).
        hidden: output of the multimodal encoder (N, D).
        masked_speech, masked_text: by input name.
        optimizer_step: optimizer steps so far.
    """

    mel: Tensor
    mel_lengths: np.ndarray
    features: Tensor
    contexts: Tensor
    tokens: Tensor
    hidden: Tensor
    text_encoder: TextEncoder
    packed_speech: PackedSequences
    packed_text: PackedSequences
    packed: PackedSequences
    multimodal: dict[str, MultimodalInput]
    randomness: Randomness
    settings: StepSettings
    optimizer_step: int
    masked_speech: dict[str, MaskedRows] = field(default_factory=dict)
    masked_text: dict[str, MaskedRows] = field(default_factory=dict)

    def rows(self, name: str, segment: str) -> np.ndarray:
        """Multimodal rows of a segment (``cls``, ``speech``, ``text``) of every sequence of an input, in batch
        order."""
        return self.packed.rows_of(name, self.multimodal[name].segments().index(segment))

    def volume(self, batch: StepBatch) -> dict[str, float]:
        """How much went through this step: 10 ms frames and tokens read, positions packed, and positions that
        attention computed."""
        blocks = self.packed.layout.blocks
        texts = [part.lengths for part in (batch.text, batch.pairs) if part is not None]
        return {
            "frames": float(self.mel_lengths.sum()),
            "tokens": float(sum(int(lengths.sum()) for lengths in texts)),
            "positions": float(self.packed.layout.num_valid),
            "attended_positions": float(sum(block.size * block.width for block in blocks)),
        }

    def stacked_mel(self, index: Tensor) -> Tensor:
        """The log-mel frames that each row of the speech layout covers, side by side; zeros past an utterance's end.

        *Shape:* rows (M,) -> (M, 4 * F).
        """
        batch, mels, width = self.mel.shape
        lengths = subsampled_lengths(self.mel_lengths)
        utterance = np.repeat(np.arange(batch), lengths)
        frame = SUBSAMPLING_FACTOR * ranges(np.zeros(batch, np.int64), lengths)[:, None] + np.arange(SUBSAMPLING_FACTOR)
        real = frame < self.mel_lengths[utterance][:, None]
        place = torch.as_tensor(np.where(real, utterance[:, None] * width + frame, batch * width)).to(index.device)
        place = place.index_select(0, self.packed_speech.gather.index_select(0, index))
        return gather_rows(self.mel.transpose(1, 2).reshape(-1, mels), place.flatten()).view(
            -1, mels * SUBSAMPLING_FACTOR
        )

    def num_sequences(self, name: str) -> int:
        return len(self.packed.order[name])

    def to_multimodal(self, name: str, segment: str, index: Tensor) -> Tensor:
        """Rows of the speech or text layout (M,) -> rows of the multimodal batch, within the sequences of input
        ``name``."""
        multimodal = self.multimodal[name]
        source, key = (
            (self.packed_speech, multimodal.speech) if segment == "speech" else (self.packed_text, multimodal.text)
        )
        assert key is not None
        destination = np.full(source.layout.num_rows, -1, np.int64)
        destination[source.rows_of(key, 0)] = self.rows(name, segment)
        return torch.as_tensor(destination).to(index.device)[index]


def run_step(
    encoders: Encoders,
    features: Tensor,
    frames: np.ndarray,
    batch: StepBatch,
    objectives: Sequence[Objective],
    randomness: Randomness,
    settings: StepSettings,
    mask_vector: Tensor | float,
    optimizer_step: int,
) -> StepOutputs:
    """Mask, encode, pack and encode again.

    Args:
        features: (B, F, T) log-mel of the speech stream's utterances, then the pairs'.
        frames: (B,) feature frames of each.
        batch: the streams' examples.
        objectives: those of the stage; their inputs decide what is encoded.
        mask_vector: the learned vector (D,), or the standard deviation of random ones.
    """
    device = features.device
    speech_inputs = [request for objective in objectives for request in objective.speech]
    text_inputs = [request for objective in objectives for request in objective.text]
    multimodal = {request.name: request for objective in objectives for request in objective.multimodal}

    subsampled = encoders.speech_encoder.subsample(features, frames)
    packed_speech = _pack_speech(speech_inputs, batch, subsampled_lengths(frames), device, settings)
    unmasked = gather_rows(subsampled, packed_speech.gather)
    speech_masks = _sample_masks(packed_speech, speech_inputs, batch, randomness, settings)
    rows, masked_speech = _mask_speech(unmasked, speech_masks, randomness, settings, mask_vector)
    contexts, projected = encoders.speech_encoder(rows, packed_speech.layout)

    source_tokens, packed_text = _pack_text(text_inputs, batch, device, settings)
    tokens = torch.cat([source_tokens, source_tokens.new_zeros(1)]).index_select(0, packed_text.gather)
    text_masks = _sample_masks(packed_text, text_inputs, batch, randomness, settings)
    corrupted, masked_text = _mask_text(tokens, text_masks, randomness, settings, encoders.text_encoder)

    modal = encoders.multimodal_encoder
    speech_rows = modal.embed_speech(projected, packed_speech.layout.positions)
    text_rows = modal.embed_text(encoders.text_encoder(corrupted, packed_text.layout.positions))
    # Under autocast the three come in two types; the Conformer's residual stream keeps the wider one.
    width_type = torch.promote_types(speech_rows.dtype, text_rows.dtype)
    source = torch.cat([modal.cls.to(width_type), speech_rows.to(width_type), text_rows.to(width_type)])
    packed = _pack_multimodal(multimodal.values(), packed_speech, packed_text, source.shape[0], device, settings)
    hidden = modal(gather_rows(source, packed.gather), packed.layout)

    return StepOutputs(
        mel=features,
        mel_lengths=frames,
        features=unmasked,
        contexts=contexts,
        tokens=tokens,
        hidden=hidden,
        text_encoder=encoders.text_encoder,
        packed_speech=packed_speech,
        packed_text=packed_text,
        packed=packed,
        multimodal=multimodal,
        randomness=randomness,
        settings=settings,
        optimizer_step=optimizer_step,
        masked_speech=masked_speech,
        masked_text=masked_text,
    )


def _pack_speech(
    inputs: Sequence[SpeechInput],
    batch: StepBatch,
    lengths: np.ndarray,
    device: torch.device,
    settings: StepSettings,
) -> PackedSequences:
    starts = np.cumsum(lengths) - lengths
    first_pair = len(batch.speech) if batch.speech is not None else 0
    where = {"speech": slice(0, first_pair), "pairs": slice(first_pair, None)}
    kinds = {i.name: Segments(starts[where[i.stream], None], lengths[where[i.stream], None]) for i in inputs}
    return pack(kinds, int(lengths.sum()), device, settings.multiple)


def _pack_text(
    inputs: Sequence[TextInput], batch: StepBatch, device: torch.device, settings: StepSettings
) -> tuple[Tensor, PackedSequences]:
    sources = {
        ("text", False): (batch.text.tokens, batch.text.lengths) if batch.text is not None else None,
        ("pairs", False): (batch.pairs.tokens, batch.pairs.lengths) if batch.pairs is not None else None,
        ("pairs", True): (batch.pairs.negative_tokens, batch.pairs.negative_lengths)
        if batch.pairs is not None
        else None,
    }
    tokens, kinds, base = [torch.zeros(0, dtype=torch.int64, device=device)], {}, 0
    for request in inputs:
        source = sources[request.stream, request.negative]
        assert source is not None, f"input {request.name} needs the stream {request.stream}"
        lengths = source[1].numpy()
        kinds[request.name] = Segments((base + np.cumsum(lengths) - lengths)[:, None], lengths[:, None])
        tokens.append(source[0])
        base += int(lengths.sum())
    return torch.cat(tokens), pack(kinds, base, device, settings.multiple)


def _pack_multimodal(
    inputs: Sequence[MultimodalInput],
    packed_speech: PackedSequences,
    packed_text: PackedSequences,
    source_rows: int,
    device: torch.device,
    settings: StepSettings,
) -> PackedSequences:
    kinds = {}
    for request in inputs:
        starts, lengths = [], []
        if request.speech is not None:
            starts.append(1 + packed_speech.starts[request.speech])
            lengths.append(packed_speech.lengths[request.speech])
        if request.text is not None:
            starts.append(1 + packed_speech.layout.num_rows + packed_text.starts[request.text])
            lengths.append(packed_text.lengths[request.text])
        if request.cls:
            starts.insert(0, np.zeros_like(starts[0]))
            lengths.insert(0, np.ones_like(lengths[0]))
        kinds[request.name] = Segments(np.concatenate(starts, axis=1), np.concatenate(lengths, axis=1))
    return pack(kinds, source_rows, device, settings.multiple, settings.max_positions)


def _identities(packed: PackedSequences, name: str, stream: str, batch: StepBatch) -> tuple[Tensor, Tensor]:
    """Example ids, unique over streams, and epochs (S,) of an input's sequences; ids are -1 elsewhere."""
    examples = getattr(batch, stream)
    ids = packed.per_sequence(name, examples.ids.numpy() + (STREAMS.index(stream) << STREAM_SHIFT))
    epochs = packed.per_sequence(name, examples.epochs.numpy(), fill=0)
    device = packed.gather.device
    return torch.as_tensor(ids).to(device), torch.as_tensor(epochs).to(device)


@dataclass
class _Masks:
    """Span masks of the inputs that ask for them, over one layout. *Shape:* mask (N,) bool; ids, epochs (S,)."""

    packed: PackedSequences
    names: list[str]
    masks: list[Tensor]
    identities: list[tuple[Tensor, Tensor]]

    def union(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mask, cu_seqlens, ids, epochs over all inputs, which never share a sequence."""
        ids = torch.stack([ids for ids, _ in self.identities]).amax(dim=0)
        epochs = torch.stack([epochs for _, epochs in self.identities]).amax(dim=0)
        return torch.stack(self.masks).any(dim=0), self.packed.layout.cu_seqlens, ids, epochs

    def split(self, index: Tensor) -> dict[str, MaskedRows]:
        """Cut the ascending index of all masked rows where the inputs meet (they are contiguous): one sync for all."""
        counts = torch.stack([mask.sum() for mask in self.masks]).tolist()
        cu_seqlens = self.packed.layout.cu_seqlens
        parts = zip(self.names, index.split(counts), self.identities, strict=True)
        return {name: MaskedRows(part, cu_seqlens, ids, epochs) for name, part, (ids, epochs) in parts}


def _sample_masks(
    packed: PackedSequences,
    inputs: Sequence[SpeechInput] | Sequence[TextInput],
    batch: StepBatch,
    randomness: Randomness,
    settings: StepSettings,
) -> _Masks | None:
    sampled = _Masks(packed, [], [], [])
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
            backend=settings.kernels,
        )
        sampled.names.append(request.name)
        sampled.masks.append(mask)
        sampled.identities.append((ids, epochs))
    return sampled if sampled.names else None


def _mask_speech(
    rows: Tensor, masks: _Masks | None, randomness: Randomness, settings: StepSettings, vector: Tensor | float
) -> tuple[Tensor, dict[str, MaskedRows]]:
    if masks is None:
        return rows, {}
    mask, cu_seqlens, ids, epochs = masks.union()
    learned = isinstance(vector, Tensor)
    rows, index = apply_spans(
        rows,
        mask,
        cu_seqlens,
        ids,
        epochs,
        key=randomness.key("mask_vectors"),
        vector=vector if learned else None,
        std=0.0 if learned else float(vector),
        backend=settings.kernels,
    )
    return rows, masks.split(index)


def _mask_text(
    tokens: Tensor, masks: _Masks | None, randomness: Randomness, settings: StepSettings, text_encoder: TextEncoder
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
        backend=settings.kernels,
    )
    return tokens, masks.split(index)
