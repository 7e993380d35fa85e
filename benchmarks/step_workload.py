"""What ``train_step.py`` runs: mixes of lengths, batches of noise, our models and NeMo's of the same size."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONF = Path(__file__).resolve().parents[1] / "conf"
FRAMES_PER_SECOND = 100
MIXES = {
    "shuffled": 1,  # utterances in any order
    "loose": 2,  # each batch from the shorter or the longer half of the utterances
    "bucketed": 20,  # each batch from a twentieth of them by length
    "sorted": None,  # each batch of neighbours by length
}
"""Buckets by length that a batch is drawn from."""


def durations(count: int, rng: np.random.Generator) -> np.ndarray:
    """Seconds of utterances: log-normal around 6 s, cut to 1 to 17 s."""
    return np.clip(rng.lognormal(np.log(6.0), 0.6, count), 1.0, 17.0)


@dataclass(frozen=True)
class Batch:
    """Utterances of one step. *Shape:* ``frames`` (B,) of 10 ms."""

    frames: np.ndarray

    @property
    def total(self) -> int:
        return int(self.frames.sum())

    @property
    def padding(self) -> float:
        """Share of a padded (B, T) that is padding."""
        return 1 - self.total / (len(self.frames) * int(self.frames.max()))

    def features(self, device: torch.device, mels: int) -> tuple[Tensor, Tensor]:
        """Noise as log-mel (B, F, T), and lengths (B,)."""
        generator = torch.Generator().manual_seed(0)
        mel = torch.randn(len(self.frames), mels, int(self.frames.max()), generator=generator)
        return mel.to(device), torch.as_tensor(self.frames).to(device)


def batches(mix: str, budget: int, count: int, seed: int = 0) -> list[Batch]:
    """``count`` batches of about ``budget`` frames, in one of MIXES."""
    rng = np.random.default_rng(seed)
    mean = durations(10_000, np.random.default_rng(0)).mean() * FRAMES_PER_SECOND
    size = max(round(budget / mean), 2)
    pool = (durations(60 * size, rng) * FRAMES_PER_SECOND).astype(np.int64)
    buckets = MIXES[mix]
    if buckets is None:
        pool = np.sort(pool)
    else:
        pool = np.concatenate([rng.permutation(part) for part in np.array_split(np.sort(pool), buckets)])
    starts = np.flatnonzero(np.diff(np.cumsum(pool) // budget, prepend=-1))  # cut where a budget is full
    parts = [part for part in np.split(pool, starts[1:]) if len(part) > 1]
    return [Batch(parts[i]) for i in rng.choice(len(parts), size=min(count, len(parts)), replace=False)]


def resolved_config(model: str, stage: str, changes: list[str]) -> Any:
    """The project's config of a stage, with the keys that ``--set`` changes."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(stage, [f"model={model}", "data=prompts", *changes])


def forget_scales() -> None:
    """Between two models: Transformer Engine goes on moving the scales of every FP8 module that it ever met, in each
    step, also of those that are gone."""
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is not None:
        quantization.FP8GlobalStateManager.reset()


def our_encoder(config: Any) -> nn.Module:
    """Speech encoder and multimodal encoder in the place of a NeMo encoder."""
    from omegaconf import OmegaConf

    from nemo_slam.models.encoder import SLAMEncoder

    keys = ("conformer", "speech_encoder", "multimodal_encoder", "pad_multiple")
    return SLAMEncoder(**{key: OmegaConf.to_container(config.model)[key] for key in keys})  # type: ignore[index]


def stock_encoder(config: Any) -> nn.Module:
    """NeMo's ``ConformerEncoder`` with as many layers of the same shape, and PyTorch's fused attention.

    Absolute positions: of NeMo's two, the cheaper, and what our layers are.
    """
    from nemo.collections.asr.modules import ConformerEncoder

    conformer = config.model.conformer
    return ConformerEncoder(
        feat_in=config.model.speech_encoder.feat_in,
        n_layers=config.model.speech_encoder.num_layers + config.model.multimodal_encoder.num_layers,
        d_model=conformer.d_model,
        subsampling="striding",
        subsampling_factor=4,
        subsampling_conv_channels=config.model.speech_encoder.conv_channels,
        ff_expansion_factor=conformer.d_ff // conformer.d_model,
        self_attention_model="abs_pos",
        n_heads=conformer.n_heads,
        conv_kernel_size=conformer.conv_kernel_size,
        conv_norm_type=f"group_norm{conformer.conv_norm_groups}",
        dropout=conformer.dropout,
        dropout_pre_encoder=0.0,
        dropout_emb=0.0,
        dropout_att=conformer.dropout_att,
        sync_max_audio_length=False,
        use_pytorch_sdpa=True,
    )


@contextlib.contextmanager
def tokenizer(vocab: int) -> Iterator[Path]:
    """A SentencePiece model of at most ``vocab`` pieces; the texts here are random tokens."""
    import sentencepiece

    words = ("one", "two", "three", "press", "star", "the", "number", "of", "call", "please", "hold", "line")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(" ".join(rng.choice(words, size=6)) for _ in range(300)))
        prefix = str(Path(folder) / "tokenizer")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=prefix, vocab_size=min(32, vocab), minloglevel=2
        )
        yield Path(f"{prefix}.model")


def pretraining_model(config: Any, tokenizer_model: Path) -> Any:
    """The model of a stage, without a trainer."""
    from omegaconf import OmegaConf, open_dict

    from nemo_slam.models.pretraining import SLAMPretrainingModel

    node = OmegaConf.create(OmegaConf.to_container(config.model, resolve=True))
    with open_dict(node):
        node.tokenizer.model_path = str(tokenizer_model)
        node.train_ds = node.validation_ds = None
    return SLAMPretrainingModel(node)


def step_batch(
    batch: Batch, number: int = 0, shares: tuple[float, float] = (0.25, 0.5), structured: bool = False
) -> Any:
    """A step of all three streams: ``batch`` as speech, a quarter as many pairs, and text.

    Args:
        number: of the step; it seeds the contents.
        shares: pairs, and texts, as shares of the utterances' number times four.
        structured: audio is a sequence of tones and text a walk through neighbouring tokens, so that there is
            something to learn; else noise.
    """
    from nemo_slam.data.batch import PairBatch, SpeechBatch, StepBatch, TextBatch

    rng = np.random.default_rng(number)
    pair_share, text_share = shares

    def audio(frames: np.ndarray) -> tuple[Tensor, Tensor]:
        lengths = torch.as_tensor(frames * 160)
        waves = rng.standard_normal((len(frames), int(frames.max(initial=0)) * 160), np.float32) * 0.05
        if structured:
            time = np.arange(1600) / 16000
            for wave in waves:
                for start in range(0, len(wave) - 1599, 1600):
                    wave[start : start + 1600] += 0.3 * np.sin(2 * np.pi * rng.integers(2, 30) * 100 * time)
        mask = np.arange(waves.shape[1]) < lengths.numpy()[:, None]
        return torch.from_numpy((waves * mask).astype(np.float32)), lengths

    def tokens(lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        total = int(lengths.sum())
        ids = np.cumsum(rng.integers(1, 3, total)) % 32 if structured else rng.integers(0, 32, total)
        return torch.from_numpy(ids.astype(np.int64)), torch.as_tensor(lengths)

    def identity(count: int) -> dict[str, Tensor]:
        return {"ids": torch.arange(count) + 1000 * number, "epochs": torch.zeros(count, dtype=torch.int64)}

    frames = np.sort(batch.frames)
    paired = frames[:: max(round(1 / pair_share), 1)] if pair_share else frames[:0]
    spoken = np.maximum(paired // 30, 4)  # about 3 tokens a second
    other = np.maximum(spoken + rng.integers(-2, 3, len(spoken)), 4)
    texts = np.sort(
        np.clip(rng.lognormal(np.log(24), 0.5, round(4 * text_share * len(frames))), 4, 128).astype(np.int64)
    )
    texts_of_pairs = *tokens(spoken), *tokens(other), torch.arange(len(paired))
    return StepBatch(
        step=number,
        speech=SpeechBatch(*audio(frames), **identity(len(frames))),
        text=TextBatch(*tokens(texts), **identity(len(texts))),
        pairs=PairBatch(*audio(paired), *texts_of_pairs, **identity(len(paired))),
    )
