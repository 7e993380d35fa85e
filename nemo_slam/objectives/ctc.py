"""CTC on paired speech at the multimodal encoder's output, as mSLAM adds it to translation language modelling.

Which input (unknown): ``translation_lm``, the speech rows of that objective's sequences, where half of the tokens and a
quarter of the frames are visible, which adds no sequence to a step; or ``speech``, the paired speech alone, as a
recogniser will hear it. Matching's sequences, with the whole text, would teach to copy.

Targets are the text's pieces, or their characters (mSLAM's vocabulary is of characters): these align much sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nemo_slam.objectives.base import Loss, Metric, Objective, ObjectiveOutput, count
from nemo_slam.objectives.inputs import MultimodalInput, SpeechInput, SpeechMasking, TextInput
from nemo_slam.objectives.spelling import symbol_count
from nemo_slam.packing import to_device

if TYPE_CHECKING:
    from nemo_slam.models.step import StepOutputs

INPUTS = ("translation_lm", "speech")
UNITS = ("pieces", "characters")


class PairCTC(Objective):
    """-log p(text | speech rows) by CTC, per token; the blank is the last output, as in NeMo.

    CTC needs a frame for each token and one more between equal neighbours. Pairs with fewer frames are left out and
    counted in the metric ``skipped``.

    Args:
        spelling: the symbols of each piece, see :func:`~nemo_slam.objectives.spelling.spellings`; None predicts pieces.
        input: ``translation_lm`` or ``speech``.
        speech_masking: of ``speech``; None hears everything.
    """

    name = "ctc"
    streams = ("pairs",)

    def __init__(
        self,
        weight: float,
        d_model: int,
        vocab_size: int,
        spelling: Sequence[Sequence[int]] | None = None,
        input: str = "translation_lm",
        speech_masking: SpeechMasking | None = None,
    ):
        super().__init__()
        self.weight = weight
        self.spelling: torch.Tensor | None
        self.register_buffer("spelling", None, persistent=False)
        if spelling is not None:
            vocab_size = symbol_count(spelling)
            width = max(map(len, spelling))
            self.spelling = torch.tensor([[*symbols, *[-1] * (width - len(symbols))] for symbols in spelling])
        self.head = nn.Linear(d_model, vocab_size + 1)
        self.source = input
        if input == "speech":
            self.source = self.name
            self.speech = (SpeechInput(self.name, "pairs", speech_masking, draw=2),)
            self.text = (TextInput(self.name, "pairs"),)  # the targets, which no sequence shows
            self.multimodal = (MultimodalInput(self.name, speech=self.name),)

    def forward(self, outputs: StepOutputs) -> ObjectiveOutput:
        device = outputs.hidden.device
        frames = outputs.packed_speech.lengths[self.source][:, 0]
        lengths = outputs.packed_text.lengths[self.source][:, 0]
        rows = to_device(outputs.rows(self.source, "speech"), device)
        token_rows = to_device(outputs.packed_text.rows_of(self.source, 0), device)
        logits = self.head(outputs.hidden.index_select(0, rows))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        tokens = outputs.tokens.index_select(0, token_rows)
        if self.spelling is not None:
            tokens, lengths = self._spell(self.spelling, tokens, lengths)

        pairs, width = len(frames), int(frames.max(initial=0))
        place = np.full((pairs, width), len(logits), np.int64)
        place[np.arange(width) < frames[:, None]] = np.arange(len(logits))
        padded = torch.cat([logits.log_softmax(dim=-1), logits.new_zeros(1, logits.shape[1])])
        padded = padded[to_device(place.T.copy(), device)]
        sizes, spans = to_device(lengths, device), to_device(frames, device)
        possible = spans >= sizes + self._repeats(tokens, lengths)
        # The sum over no rows keeps the head in the graph of a step without a pair.
        loss = logits.sum() * 0
        if pairs:
            # An impossible pair is given no tokens: its own loss would be infinite, and its gradient not a number.
            blank = logits.shape[1] - 1
            chosen = possible.repeat_interleave(sizes, output_size=int(lengths.sum()))
            losses = F.ctc_loss(
                padded, tokens[chosen], spans, torch.where(possible, sizes, 0), blank=blank, reduction="none"
            )
            loss = loss + (losses * possible).sum()
        total = count((sizes * possible).sum(), loss)
        skipped = Metric(f"{self.name}/skipped", count((~possible).sum(), loss), count(pairs, loss))
        return ObjectiveOutput([Loss(self.name, loss, total, self.weight)], [skipped])

    @staticmethod
    def _spell(spelling: torch.Tensor, tokens: torch.Tensor, lengths: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Texts of pieces laid end to end (N,), and their lengths (B,), as texts of symbols."""
        symbols = spelling.index_select(0, tokens)
        real = symbols >= 0
        ends = np.concatenate([[0], real.sum(1).cumsum(0).cpu().numpy()])[np.cumsum(lengths)]
        return symbols[real], np.diff(ends, prepend=0)

    @staticmethod
    def _repeats(tokens: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
        """(B,) how often a token equals the one before it, within each text of tokens laid end to end (N,)."""
        if len(tokens) == 0:
            return torch.zeros(len(lengths), dtype=torch.int64, device=tokens.device)
        first = np.zeros(len(tokens), bool)
        first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        equal = torch.cat([tokens.new_zeros(1, dtype=torch.bool), tokens[1:] == tokens[:-1]])
        equal = equal & ~to_device(first, tokens.device)
        text = to_device(np.repeat(np.arange(len(lengths)), lengths), tokens.device)
        return torch.zeros(len(lengths), dtype=torch.int64, device=tokens.device).index_add(0, text, equal.long())
