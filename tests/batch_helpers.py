"""Batches of the tests: parts of them, and features in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nemo_slam.data.batch import PairBatch, SpeechBatch, StepBatch, TextBatch


def exact_features(batch: StepBatch) -> tuple[torch.Tensor, np.ndarray]:
    """80 fixed projections of each 10 ms in float64; NeMo's mel is float32 inside, so that 1e-9 could not be asked."""
    projection = torch.randn(160, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(9)) / 4
    frames = [p.audio_lengths // 160 for p in (batch.speech, batch.pairs) if p is not None]
    waves = [p.audio.double() for p in (batch.speech, batch.pairs) if p is not None]
    width = max((wave.shape[1] // 160 for wave in waves), default=0)
    mels = [
        torch.nn.functional.pad(w, (0, width * 160 + 160)).unfold(1, 160, 160)[:, :width] @ projection for w in waves
    ]
    return torch.cat(mels).transpose(1, 2), torch.cat(frames).numpy()


def select(batch: StepBatch, keep: Mapping[str, Sequence[int]]) -> StepBatch:
    """The batch with some examples of each stream; a stream that ``keep`` does not name is left without any."""

    def audio(part, chosen):
        lengths = part.audio_lengths[chosen]
        return part.audio[chosen, : int(lengths.max()) if len(lengths) else 0], lengths

    def text(tokens, lengths, chosen):
        pieces = tokens.split(lengths.tolist())
        return torch.cat([tokens[:0], *(pieces[j] for j in chosen)]), lengths[chosen]

    s, t, p = (list(keep.get(name, ())) for name in ("speech", "text", "pairs"))
    return StepBatch(
        step=batch.step,
        speech=SpeechBatch(*audio(batch.speech, s), batch.speech.ids[s], batch.speech.epochs[s]),
        text=TextBatch(*text(batch.text.tokens, batch.text.lengths, t), batch.text.ids[t], batch.text.epochs[t]),
        pairs=PairBatch(
            *audio(batch.pairs, p),
            *text(batch.pairs.tokens, batch.pairs.lengths, p),
            *text(batch.pairs.negative_tokens, batch.pairs.negative_lengths, p),
            batch.pairs.text_classes[p],
            batch.pairs.ids[p],
            batch.pairs.epochs[p],
        ),
    )
