"""Text to text: the pre-trained text encoder with a Transformer decoder, for machine translation."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from nemo.collections.asr.modules.transformer import get_nemo_transformer
from nemo.collections.asr.modules.transformer.transformer_generators import BeamSearchSequenceGenerator
from nemo.collections.asr.parts.submodules.token_classifier import TokenClassifier
from nemo.collections.common.parts import transformer_weights_init
from nemo.collections.common.tokenizers import SentencePieceTokenizer
from omegaconf import DictConfig
from torch import Tensor, nn

from nemo_slam.evaluation.text_metrics import bleu_score, count
from nemo_slam.finetuning.sentences import Sentences
from nemo_slam.finetuning.task import plain
from nemo_slam.finetuning.text_model import TextBatch, TextModel, pad


class SLAMTranslationModel(TextModel):
    """NeMo's ``EncDecTransfModelBPE`` with text in: the same decoder, head and beam search (SLAM, section 4.1).

    Keys of the config node: those of `TextModel`; ``tokenizer.model_path`` (of the target, with ``<s>``, ``</s>`` and
    ``<pad>``), ``transf_decoder``, ``head``, ``beam_search``, ``label_smoothing``.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.tokenizer = SentencePieceTokenizer(
            self.register_artifact("tokenizer.model_path", cfg.tokenizer.model_path)
        )
        vocabulary = self.tokenizer.vocab_size
        decoder = {**plain(self.cfg.transf_decoder), "vocab_size": vocabulary}
        for key in ("library", "model_name", "pretrained"):  # of NeMo's config; the arguments below say the same
            decoder.pop(key, None)
        self.transf_decoder = get_nemo_transformer(
            config_dict=decoder, encoder=False, pre_ln_final_layer_norm=decoder.get("pre_ln_final_layer_norm", False)
        )
        width = self.transf_decoder.hidden_size
        self.adapter = nn.Identity() if self.encoder.d_model == width else nn.Linear(self.encoder.d_model, width)
        self.log_softmax = TokenClassifier(hidden_size=width, num_classes=vocabulary, **self.cfg.head)
        self.log_softmax.mlp.layer0.weight = self.transf_decoder.embedding.token_embedding.weight
        for module in (self.transf_decoder, self.log_softmax):
            module.apply(lambda part: transformer_weights_init(part, width**-0.5))
        self.beam_search = BeamSearchSequenceGenerator(
            embedding=self.transf_decoder.embedding,
            decoder=self.transf_decoder.decoder,
            log_softmax=self.log_softmax,
            max_sequence_length=self.transf_decoder.max_sequence_length,
            beam_size=self.cfg.beam_search.beam_size,
            bos=self.tokenizer.bos_id,
            pad=self.tokenizer.pad_id,
            eos=self.tokenizer.eos_id,
            len_pen=self.cfg.beam_search.len_pen,
            max_delta_length=self.cfg.beam_search.max_generation_delta,
        )

    def collate(self, sentences: Sentences) -> TextBatch:
        """Source tokens (B, U) and lengths (B, 1), target tokens (B, V) from ``<s>`` to ``</s>``, and lengths (B,)."""
        framed = [
            np.concatenate([[self.tokenizer.bos_id], target, [self.tokenizer.eos_id]]) for target in sentences.targets
        ]
        return pad(sentences.tokens, 0)[0], torch.from_numpy(sentences.lengths), *pad(framed, self.tokenizer.pad_id)

    def encode(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """*Shape:* tokens (B, U), lengths (B, 1) -> states (B, U', H) and their mask (B, U')."""
        encoded, sizes = self.encoder(tokens, lengths)
        mask = torch.arange(encoded.shape[1], device=encoded.device) < sizes.to(encoded.device)[:, None]
        states = self.adapter(encoded)
        return states, mask.to(states.dtype)

    def forward(self, tokens: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """*Shape:* tokens (B, U), lengths (B, 1), the target so far (B, V) -> log-probabilities (B, V, vocabulary)."""
        states, mask = self.encode(tokens, lengths)
        return self.decode(states, mask, targets)

    def decode(self, states: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """The decoder's half of :meth:`forward`."""
        real = (targets != self.tokenizer.pad_id).to(targets.dtype)
        hidden = self.transf_decoder(input_ids=targets, decoder_mask=real, encoder_embeddings=states, encoder_mask=mask)
        return self.log_softmax(hidden_states=hidden)

    def losses(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        tokens, lengths, targets, _ = batch
        return self._loss(self(tokens, lengths, targets[:, :-1]), targets[:, 1:], self.cfg.label_smoothing)

    def _loss(self, log_probs: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        pad_id = self.tokenizer.pad_id
        # The log of a softmax passes through cross_entropy's own unchanged.
        total = F.cross_entropy(
            log_probs.flatten(0, 1).float(), labels.flatten(), ignore_index=pad_id, reduction="sum",
            label_smoothing=smoothing,
        )  # fmt: skip
        return total, (labels != pad_id).sum()

    def search(self, states: Tensor, mask: Tensor) -> list[str]:
        """Translations of encoded texts by beam search."""
        found = self.beam_search(encoder_hidden_states=states, encoder_input_mask=mask, return_beam_scores=False)
        return [self.tokenizer.ids_to_text(tokens) for tokens in found.cpu().tolist()]

    @torch.no_grad()
    def answer(self, texts: list[list[str]]) -> list[str]:
        was_training = self.training
        self.eval()
        try:
            return self.search(*self.encode(*self.encode_texts(texts)))
        finally:
            self.train(was_training)

    def translate(self, texts: list[str]) -> list[str]:
        """Translations of texts, in order; see :meth:`answer`."""
        return self.answer([[text] for text in texts])

    def validation_counts(self, batch: TextBatch) -> Tensor:
        tokens, lengths, targets, _ = batch
        states, mask = self.encode(tokens, lengths)
        total, number = self._loss(self.decode(states, mask, targets[:, :-1]), targets[:, 1:], 0.0)
        references = [self.tokenizer.ids_to_text(row) for row in targets.cpu().tolist()]
        counts = torch.from_numpy(count("bleu", references, self.search(states, mask)).per_utterance.sum(axis=0))
        return torch.cat([torch.stack([total.double().cpu(), number.double().cpu()]), counts])

    def validation_figures(self, counts: np.ndarray) -> dict[str, float]:
        return {"loss": counts[0] / max(counts[1], 1), "sacreBLEU": bleu_score(counts[2:])}
