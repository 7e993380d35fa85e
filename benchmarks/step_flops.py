"""Arithmetic that a step cannot avoid: matrix products on real rows, no padding, nothing computed again.

Counted by hand from the layers' shapes; ``tests/test_train_step.py`` compares the forward with PyTorch's own count.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def rows_of(frames: np.ndarray) -> np.ndarray:
    """Rows of 40 ms that utterances of ``frames`` (B,) become."""
    return -(-np.asarray(frames, np.int64) // 4)


def layers(lengths: np.ndarray, conformer: Any, count: int) -> float:
    """Forward of ``count`` Conformer layers on sequences of ``lengths`` (S,) rows."""
    width, hidden, rows = conformer.d_model, conformer.d_ff, float(lengths.sum())
    feed_forward = 2 * 2 * 2 * width * hidden
    projections = 2 * 4 * width * width
    convolution = 2 * 3 * width * width + 2 * width * conformer.conv_kernel_size
    attention = 2 * 2 * width * float(np.square(lengths.astype(np.float64)).sum())
    return count * (rows * (feed_forward + projections + convolution) + attention)


def front_end(frames: np.ndarray, model: Any) -> float:
    """Forward of the two convolutions of stride 2 and the projection."""
    channels, mels, width = model.speech_encoder.conv_channels, model.speech_encoder.feat_in, model.conformer.d_model
    half, quarter = -(-frames // 2), rows_of(frames)
    mels_half, mels_quarter = -(-mels // 2), -(-mels // 4)
    first = 2 * 9 * channels * mels_half * float(half.sum())
    second = 2 * 9 * channels * channels * mels_quarter * float(quarter.sum())
    return first + second + 2 * channels * mels_quarter * width * float(quarter.sum())


def encoder(frames: np.ndarray, model: Any) -> float:
    """Forward of front end and all layers on utterances of ``frames`` (B,), as our encoder and NeMo's run it; without
    our projection between the two encoders."""
    count = model.speech_encoder.num_layers + model.multimodal_encoder.num_layers
    return front_end(frames, model) + layers(rows_of(frames), model.conformer, count)


def step(
    frames: np.ndarray, speech: np.ndarray, multimodal: np.ndarray, masked_speech: int, masked_text: int, model: Any
) -> float:
    """Forward of a pre-training step.

    Args:
        frames: (B,) of each utterance.
        speech, multimodal: rows of each sequence of the two encoders.
        masked_speech, masked_text: rows whose codes and tokens are predicted.
        model: the ``model`` node.
    """
    width = model.conformer.d_model
    heads = 2.0 * masked_text * width * model.text_encoder.vocab_size
    if model.quantizer is not None:
        codes, size = model.quantizer.num_codes, model.quantizer.code_dim
        # Logits of the codes, their vectors, the context's projection, the prediction; and the distractors.
        heads += 2.0 * masked_speech * (width * codes + codes * size + width * size + width * codes)
        heads += 2.0 * masked_speech * size * (1 + model.speech_loss.num_distractors)
    projection = 2.0 * float(speech.sum()) * width * width
    return (
        front_end(frames, model)
        + layers(speech, model.conformer, model.speech_encoder.num_layers)
        + layers(multimodal, model.conformer, model.multimodal_encoder.num_layers)
        + projection
        + heads
    )
