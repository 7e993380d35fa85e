"""The pre-training network as parameters and operations, from the ``model`` node of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nemo_slam.objectives.spelling import spell, symbol_count
from nemo_slam.planning.operations import SINGLE, Tally
from nemo_slam.planning.workload import Lengths, MicroBatch, expected_masked_frames

CONTRASTIVE_CHUNK = 128
"""Rows that the PyTorch twin of the contrastive loss takes at a time."""


def parameters(model: Mapping[str, Any]) -> dict[str, int]:
    """Trained parameters, by part."""
    conformer, speech, text = model["conformer"], model["speech_encoder"], model["text_encoder"]
    d, ff, taps = conformer["d_model"], conformer["d_ff"], conformer["conv_kernel_size"]
    channels, mels, vocab = speech["conv_channels"], speech["feat_in"], text["vocab_size"]
    feed_forward = 2 * d * ff + d + ff
    convolution = (2 * d * d + 2 * d) + (taps * d + d) + 2 * d + (d * d + d)
    layer = 2 * feed_forward + 4 * (d * d + d) + convolution + 5 * 2 * d
    front_end = 10 * channels + (9 * channels + 1) * channels + channels * quarter(mels) * d + d
    modal = model["multimodal_encoder"]
    objectives = model["objectives"]
    heads = 0
    if objectives["masked_speech"] is not None or objectives["translation_lm"] is not None:
        gumbel = model["quantizer"]
        codes = (gumbel or model["random_projection"])["num_codes"]
        heads += (d + 1) * codes
        if gumbel is not None:
            heads += (d + 1) * codes + codes * gumbel["code_dim"] + (d + 1) * gumbel["code_dim"]
    if objectives["masked_text"] is not None or objectives["translation_lm"] is not None:
        heads += vocab
    if (matching := objectives["matching"]) is not None:
        heads += d + 1 + 2 * (d + 1) * d * (matching.get("negatives") == "in_batch")
    if objectives["ctc"] is not None:
        heads += (d + 1) * (ctc_symbols(model) + 1)
    heads += d * (model["mask_vector"]["kind"] == "learned")
    return {
        "front end": front_end,
        "speech encoder": speech["num_layers"] * layer + (d + 1) * d,
        "text embedding": (vocab + 1) * d + 2 * d,
        "multimodal encoder": modal["num_layers"] * layer + d + 2 * d * modal["modality_embedding"],
        "quantizer and heads": heads,
    }


def ctc_symbols(model: Mapping[str, Any]) -> int:
    """What CTC chooses from, its blank left out. How many characters there are, only the tokenizer's file knows."""
    if model["objectives"]["ctc"].get("units", "pieces") == "pieces":
        return int(model["text_encoder"]["vocab_size"])
    import sentencepiece  # spares all other plans a compiled module

    path = Path(model["tokenizer"]["model_path"])
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"model.objectives.ctc.units=characters: how many there are, model.tokenizer.model_path says, but {path} "
            f"cannot be read ({error}): train it first, or plan with units=pieces, of which there are more"
        ) from error
    return symbol_count(spell(tokenizer))


def quarter(mels: int) -> int:
    """Mel channels after two convolutions of stride 2."""
    return (mels + 3) // 4


class Network:
    """Adds the operations of one micro-batch to a tally.

    Args:
        model: the ``model`` node, resolved.
        tally: takes them.
        fused: Triton's kernels, or their PyTorch twins.
    """

    def __init__(self, model: Mapping[str, Any], tally: Tally, fused: bool):
        self.model, self.tally, self.fused = model, tally, fused
        self.conformer = model["conformer"]
        self.width = self.conformer["d_model"]
        if self.conformer.get("fp8", "none") != "none":
            raise ValueError(f"model.conformer.fp8={self.conformer['fp8']} cannot be planned: set it to none")

    def add(self, batch: MicroBatch) -> None:
        """All of one micro-batch, forward and backward."""
        objectives = self.model["objectives"]
        speech, pairs = batch.speech.to_rows(), batch.pair_speech.to_rows()
        tlm, matching = objectives["translation_lm"] is not None, objectives["matching"] is not None
        alone = objectives["ctc"] is not None and objectives["ctc"].get("input") == "speech"
        acoustic = [speech] * (objectives["masked_speech"] is not None) + [pairs] * (tlm + matching + alone)
        pair = pairs + batch.pair_text + 1
        multimodal = [
            *[speech] * (objectives["masked_speech"] is not None),
            *[batch.text] * (objectives["masked_text"] is not None),
            *[pair] * (tlm + matching),
            *[pairs + batch.pair_negative + 1] * matching,
            *[pairs] * alone,
        ]
        texts = [batch.text] * (objectives["masked_text"] is not None)
        texts += [batch.pair_text] * (tlm + matching + alone) + [batch.pair_negative] * matching
        spoken = self._packed(acoustic)
        if acoustic:
            self.tally.part = "front end"
            self._front_end(batch)
            if self.model.get("augmentation") is not None:  # the noisy speech beside the clean targets
                self._front_end(replace(batch, pair_speech=Lengths.of([])))
        self.tally.part = "speech encoder"
        self._layers(acoustic, self.model["speech_encoder"]["num_layers"])
        self.tally.linear(spoken, self.width, self.width, input_bytes=self.tally.precision.residual)
        self.tally.part = "text embedding"
        self._text_encoder(self._packed(texts))
        self.tally.part = "multimodal encoder"
        self.tally.dropout(spoken, self.width, self.conformer["dropout"])
        self.tally.elementwise(self._packed(multimodal), self.width, self.tally.precision.residual)
        self._layers(multimodal, self.model["multimodal_encoder"]["num_layers"])
        self.tally.part = "losses"
        self._losses(batch, speech, pairs)

    def _front_end(self, batch: MicroBatch) -> None:
        tally, size = self.tally, self.tally.precision.compute
        channels, mels = self.model["speech_encoder"]["conv_channels"], self.model["speech_encoder"]["feat_in"]
        frames = batch.speech.spaced_frames() + batch.pair_speech.spaced_frames()
        rows = batch.speech.to_rows().rows + batch.pair_speech.to_rows().rows
        half, fourth = frames / 2 * ((mels + 1) // 2), frames / 4 * quarter(mels)
        tally.linear(half, 9, channels, saved=False, input_gradient=False)
        tally.add(saved=frames * mels * size)
        tally.elementwise(half, channels, saved=1)  # ReLU
        tally.elementwise(half, channels)  # gaps to zero
        tally.linear(fourth, 9 * channels, channels, saved=False)
        tally.add(saved=half * channels * size)
        tally.elementwise(fourth, channels, saved=1)
        tally.elementwise(fourth, channels, reads=1)  # rows out of the image
        tally.linear(rows, channels * quarter(mels), self.width)
        tally.elementwise(rows, self.width, reads=1)  # masking, and the gather into the layout

    def _packed(self, kinds: list[Lengths]) -> float:
        """Rows of a layout, its tail included."""
        multiple = self.model["pad_multiple"]
        return float(np.ceil(sum(kind.rows for kind in kinds) / multiple) * multiple)

    def _layers(self, kinds: list[Lengths], count: int) -> None:
        if self.conformer.get("activation_checkpointing"):
            self._recomputed_layers(kinds, count)
        else:
            for _ in range(count):
                self._layer(kinds)
        self.tally.add(saved=24.0 * self._packed(kinds))  # the layout's indices

    def _recomputed_layers(self, kinds: list[Lengths], count: int) -> None:
        """Each keeps its input alone, and runs once more in the backward: one layer's activations at a time."""
        single = Tally(self.tally.precision, self.tally.mask_bytes, self.tally.fused_attention)
        Network(self.model, single, self.fused)._layer(kinds)
        for cost in (c for costs in single.operations.values() for c in costs):
            (forward, backward), (read, read_back) = cost.products, cost.moved
            for _ in range(count):
                self.tally.add((forward, backward + forward), (read, read_back + read))
        inputs = count * self._packed(kinds) * self.width * self.tally.precision.residual
        self.tally.add(saved=inputs + single.total().saved)

    def _layer(self, kinds: list[Lengths]) -> None:
        """One Conformer layer; norms keep the residual stream, products what they multiply."""
        tally, node, d = self.tally, self.conformer, self.width
        rows, residual = self._packed(kinds), self.tally.precision.residual
        self._feed_forward(rows)
        tally.norm(rows, d)
        for number in range(3):
            tally.linear(rows, d, d, saved=number == 0, input_bytes=residual)
        # One product: the joined weights are kept for its backward. Those that autocast makes are among its copies.
        joined = 3 * d * d * tally.precision.compute
        tally.add(moved=(2 * joined, 2 * joined), saved=joined * (tally.precision.copies == 0))
        tally.attention(rows, sum(kind.squares for kind in kinds), d, node["n_heads"])
        tally.linear(rows, d, d)
        self._residual(rows)
        tally.norm(rows, d)
        tally.linear(rows, d, 2 * d, input_bytes=residual)
        sequences = sum(kind.count for kind in kinds)
        tally.convolution(rows, d, node["conv_kernel_size"], node["conv_norm_groups"], sequences, self.fused)
        tally.linear(rows, d, d)
        self._residual(rows)
        self._feed_forward(rows)
        tally.norm(rows, d)

    def _feed_forward(self, rows: float) -> None:
        tally, node, d, ff = self.tally, self.conformer, self.width, self.conformer["d_ff"]
        tally.norm(rows, d)
        tally.linear(rows, d, ff, input_bytes=self.tally.precision.residual)
        tally.elementwise(rows, ff, saved=1)  # SiLU
        tally.dropout(rows, ff, node["dropout"])
        tally.linear(rows, ff, d)
        self._residual(rows)

    def _residual(self, rows: float) -> None:
        self.tally.dropout(rows, self.width, self.conformer["dropout"])
        self.tally.elementwise(rows, self.width, self.tally.precision.residual, reads=2)

    def _text_encoder(self, tokens: float) -> None:
        self.tally.elementwise(tokens, self.width, self.tally.precision.residual)
        self.tally.norm(tokens, self.width)
        self.tally.dropout(tokens, self.width, self.model["text_encoder"]["dropout"])
        self.tally.add(saved=8.0 * tokens)

    def _losses(self, batch: MicroBatch, speech: Lengths, pairs: Lengths) -> None:
        objectives, vocab = self.model["objectives"], self.model["text_encoder"]["vocab_size"]
        if (node := objectives["masked_speech"]) is not None:
            self._speech_loss(speech, node["masking"])
        if (node := objectives["masked_text"]) is not None:
            self._cross_entropy(batch.text.rows * node["masking"]["rate"], vocab)
        if (node := objectives["translation_lm"]) is not None:
            self._speech_loss(pairs, node["speech_masking"])
            self._cross_entropy(batch.pair_text.rows * node["token_masking"]["rate"], vocab)
        if objectives["ctc"] is not None:
            outputs = ctc_symbols(self.model) + 1
            self.tally.linear(pairs.rows, self.width, outputs)
            self.tally.elementwise(pairs.rows, outputs, SINGLE, saved=2)

    def _speech_loss(self, lengths: Lengths, masking: Mapping[str, Any]) -> None:
        tally, d = self.tally, self.width
        masked = expected_masked_frames(lengths, masking["start_probability"], masking["span"])
        rows = float(lengths.weights @ masked)
        if self.model["quantizer"] is None:
            self._cross_entropy(rows, self.model["random_projection"]["num_codes"])
            return
        codes, width = self.model["quantizer"]["num_codes"], self.model["quantizer"]["code_dim"]
        tally.norm(rows, d, SINGLE)
        tally.linear(rows, d, codes)
        tally.elementwise(rows, codes, SINGLE, reads=2, saved=2)  # with noise, and without
        tally.linear(rows, codes, width)
        tally.linear(rows, d, width)
        self._contrastive(rows, masked, width)
        self._cross_entropy(rows, codes)

    def _contrastive(self, rows: float, masked: np.ndarray, width: int) -> None:
        drawn = self.model["speech_loss"]["num_distractors"]
        usual = float(masked.mean()) if len(masked) else 0.0
        # The twin multiplies a chunk of rows with all masked rows of the utterances that it touches.
        seen = drawn + 1 if self.fused else min(rows, usual * (1 + np.ceil(CONTRASTIVE_CHUNK / max(usual, 1.0))))
        product = 2 * rows * seen * width
        size = self.tally.precision.compute if self.fused else SINGLE
        kept = 2 * rows * width * size * (1 if self.fused else 2) + rows * seen * SINGLE
        self.tally.add((product, 2 * product), (3 * kept, 4 * kept), kept + (8 * rows * drawn if self.fused else 0))

    def _cross_entropy(self, rows: float, outputs: int) -> None:
        """Logits are kept by the twin; the kernels compute them again from the rows."""
        self.tally.linear(rows, self.width, outputs)
        self.tally.elementwise(rows, outputs, SINGLE, saved=0 if self.fused else 1)
        if self.fused:
            self.tally.add((0, 2 * rows * self.width * outputs))
