"""Probes of a saved model on manifests; ``scripts/evaluate.py --probes`` calls this."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from nemo.core.classes import ModelPT
from torch import nn

from nemo_slam.archive import read_config
from nemo_slam.data.batch import StepBatch
from nemo_slam.data.config import PairsConfig, SpeechConfig
from nemo_slam.data.pairs import PairStream
from nemo_slam.data.speech import SpeechStream
from nemo_slam.evaluation.probes import effective_rank, probe
from nemo_slam.export_onnx import load_encoder
from nemo_slam.models.pretraining import SLAMPretrainingModel
from nemo_slam.objectives.metrics import MetricAccumulator

FRAMES_PER_BATCH = 6000


def probe_model(path: str | Path, manifests: Sequence[str | Path]) -> dict[str, float]:
    """Figures by name, over all rows of the manifests.

    A model of pre-training gives what its objectives allow, on pairs; any other with our speech encoder gives
    ``effective_rank`` alone: of all its output rows, centred.

    Raises:
        FileNotFoundError, ValueError: no such file, no NeMo archive, or a model without our speech encoder.
    """
    target = str(read_config(path).get("target"))
    names = [str(manifest) for manifest in manifests]
    # The index of a manifest lies beside it as a rule; evaluation leaves nothing there.
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        if target.endswith(".SLAMPretrainingModel"):
            model = SLAMPretrainingModel.restore_from(str(path), map_location="cpu").eval()
            pairs = PairsConfig(names, FRAMES_PER_BATCH, max_duration=60.0, cache_dir=cache)
            figures = _probes(model, PairStream(pairs, model.tokenizer_model, seed=0))
            return {**figures, "effective_rank": _rank(model.preprocessor, load_encoder(path).eval(), names, cache)}
        model = ModelPT.restore_from(str(path), map_location="cpu").eval()
        if not hasattr(model, "preprocessor") or not hasattr(getattr(model, "encoder", None), "speech_encoder"):
            raise ValueError(f"{path} holds a {target}, which has no SLAM speech encoder to probe")
        return {"effective_rank": _rank(model.preprocessor, model.encoder, names, cache)}


def _probes(model: SLAMPretrainingModel, stream: PairStream) -> dict[str, float]:
    accumulator = MetricAccumulator()
    for step in range(stream.sampler.steps_once):
        batch = stream.batch(step, once=True)
        if len(batch):
            accumulator.update(probe(model, StepBatch(step, pairs=batch)), {})
    figures = {name: value for name, value in accumulator.flush().items() if not math.isnan(value)}
    return {name.removeprefix("probe/"): value for name, value in figures.items() if name.startswith("probe/")}


def _rank(preprocessor: nn.Module, encoder: nn.Module, manifests: list[str], cache: str) -> float:
    """Effective rank of the encoder's output rows for all speech."""
    stream = SpeechStream(SpeechConfig(manifests, FRAMES_PER_BATCH, max_duration=60.0, cache_dir=cache), seed=0)
    rows = []
    for step in range(stream.sampler.steps_once):
        batch = stream.batch(step, once=True)
        if not len(batch.audio_lengths):
            continue
        features, frames = preprocessor(input_signal=batch.audio, length=batch.audio_lengths)
        encoded, lengths = encoder(audio_signal=features, length=frames)
        rows += [out[:, : int(length)].T for out, length in zip(encoded, lengths, strict=True)]
    return float(effective_rank(torch.cat(rows)))
