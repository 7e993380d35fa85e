"""One step of pre-training: pack every objective's sequences, run each encoder once.

Shape legend: B utterances, T feature frames (padded input only), N packed rows, S sequences, M masked rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from nemo_slam.data.batch import StepBatch
from nemo_slam.models.masking import CorruptionConfig, MaskedRows, mask_speech, mask_text, sample_masks
from nemo_slam.modules.multimodal_encoder import MultimodalEncoder
from nemo_slam.modules.speech_encoder import SUBSAMPLING_FACTOR, SpeechEncoder, subsampled_lengths
from nemo_slam.modules.text_encoder import TextEncoder
from nemo_slam.objectives.base import Objective
from nemo_slam.objectives.in_batch_negatives import ChosenTexts
from nemo_slam.objectives.inputs import MultimodalInput, SpeechInput, TextInput
from nemo_slam.packing import PackedSequences, Segments, gather_rows, pack, ranges, to_device
from nemo_slam.randomness import Randomness


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
    corruption: of masked tokens.
    """

    kernels: str
    multiple: int = 1
    max_positions: int | None = None
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)


@dataclass
class EncodedSpeech:
    """What is known of a step before its texts are packed. *Shape:* contexts (N_s, D) in the speech layout."""

    contexts: Tensor
    packed_speech: PackedSequences
    text_encoder: TextEncoder
    batch: StepBatch
    randomness: Randomness
    settings: StepSettings


@dataclass
class StepOutputs:
    """Everything an objective may read.

    Attributes:
        mel: log-mel (B, F, T) of the speech stream's utterances, then the pairs'.
        mel_lengths: (B,) their 10 ms frames, on the CPU.
        features: unmasked subsampled features of the clean audio in the speech layout (N_s, D).
        contexts: output of the speech encoder's layers (N_s, D).
        tokens: uncorrupted token ids in the text layout (N_t,).
        hidden: output of the multimodal encoder (N, D).
        masked_speech, masked_text: by input name.
        chosen_texts: negatives taken from the batch, by input name.
        optimizer_step: optimizer steps so far.
        attended_positions: those of a multimodal layer's attention, padding included.
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
    attended_positions: int
    masked_speech: dict[str, MaskedRows] = field(default_factory=dict)
    masked_text: dict[str, MaskedRows] = field(default_factory=dict)
    chosen_texts: dict[str, ChosenTexts] = field(default_factory=dict)

    def rows(self, name: str, segment: str) -> np.ndarray:
        """Multimodal rows of a segment (``cls``, ``speech``, ``text``) of every sequence of an input, in batch
        order."""
        return self.packed.rows_of(name, self.multimodal[name].segments().index(segment))

    def volume(self, batch: StepBatch) -> dict[str, float]:
        """How much went through this step: 10 ms frames and tokens read, positions packed, and positions that
        attention computed."""
        texts = [part.lengths for part in (batch.text, batch.pairs) if part is not None]
        return {
            "frames": float(self.mel_lengths.sum()),
            "tokens": float(sum(int(lengths.sum()) for lengths in texts)),
            "positions": float(self.packed.layout.num_valid),
            "attended_positions": float(self.attended_positions),
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
        place = to_device(np.where(real, utterance[:, None] * width + frame, batch * width), index.device)
        place = place.index_select(0, self.packed_speech.gather.index_select(0, index))
        return gather_rows(self.mel.transpose(1, 2).reshape(-1, mels), place.flatten()).view(
            -1, mels * SUBSAMPLING_FACTOR
        )

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
        return to_device(destination, index.device)[index]


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
    noisy: Tensor | None = None,
) -> StepOutputs:
    """Mask, encode, pack and encode again.

    Args:
        features: (B, F, T) log-mel of the speech stream's utterances, then the pairs'.
        frames: (B,) feature frames of each.
        batch: the streams' examples.
        objectives: those of the stage; their inputs decide what is encoded.
        mask_vector: the learned vector (D,), or the standard deviation of random ones.
        noisy: (B', F, T) log-mel of the speech stream's utterances to encode in the place of the clean, which stay the
            targets.
    """
    device = features.device
    speech_inputs = [request for objective in objectives for request in objective.speech]
    text_inputs = [request for objective in objectives for request in objective.text]
    multimodal = {request.name: request for objective in objectives for request in objective.multimodal}

    subsampled = encoders.speech_encoder.subsample(features, frames)
    packed_speech = _pack_speech(speech_inputs, batch, subsampled_lengths(frames), device, settings)
    unmasked = gather_rows(subsampled, packed_speech.gather)
    speech_masks = sample_masks(packed_speech, speech_inputs, batch, randomness, settings.kernels)
    heard = unmasked
    if noisy is not None:
        clean = int(subsampled_lengths(frames[: len(noisy)]).sum())
        rows = encoders.speech_encoder.subsample(noisy, frames[: len(noisy)])
        heard = gather_rows(torch.cat([rows, subsampled[clean:]]), packed_speech.gather)
    rows, masked_speech = mask_speech(heard, speech_masks, randomness, settings.kernels, mask_vector)
    contexts, projected = encoders.speech_encoder(rows, packed_speech.layout)

    encoded = EncodedSpeech(contexts, packed_speech, encoders.text_encoder, batch, randomness, settings)
    chosen_texts = {name: c for objective in objectives for name, c in objective.choose_texts(encoded).items()}
    source_tokens, packed_text = _pack_text(text_inputs, batch, device, settings, chosen_texts)
    tokens = torch.cat([source_tokens, source_tokens.new_zeros(1)]).index_select(0, packed_text.gather)
    text_masks = sample_masks(packed_text, text_inputs, batch, randomness, settings.kernels)
    corrupted, masked_text = mask_text(
        tokens, text_masks, randomness, settings.kernels, encoders.text_encoder, settings.corruption
    )

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
        attended_positions=modal.layers.attended_positions(packed.layout),
        masked_speech=masked_speech,
        masked_text=masked_text,
        chosen_texts=chosen_texts,
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
    inputs: Sequence[TextInput],
    batch: StepBatch,
    device: torch.device,
    settings: StepSettings,
    chosen_texts: Mapping[str, ChosenTexts],
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
        starts = base + np.cumsum(lengths) - lengths
        tokens.append(source[0])
        base += len(source[0])
        if request.name in chosen_texts:
            chosen = chosen_texts[request.name]
            texts, index = chosen.lengths, chosen.index
            starts = np.where(index >= 0, (base + np.cumsum(texts) - texts)[index], starts)
            lengths = np.where(index >= 0, texts[index], lengths)
            tokens.append(chosen.tokens)
            base += len(chosen.tokens)
        kinds[request.name] = Segments(starts[:, None], lengths[:, None])
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
