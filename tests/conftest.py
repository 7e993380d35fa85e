"""Shared by all tests. A small pre-training model and batches of noise; NeMo is imported only where a test asks for
it."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# ModelPT and the experiment manager look at these; nothing in the tests may reach out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
# The same examples in every run; HYPOTHESIS_PROFILE=default draws others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

WORDS = ["one", "two", "three", "press", "star", "the", "number", "of", "call", "please", "hold", "line", "conference"]


OPEN_FILES = 400
"""Of a process, many systems allow 1,024; one test may open 350."""


@pytest.fixture(autouse=True)
def close_files_of_finished_runs():
    """Trainer, model and streams refer to each other: their files stay open until Python looks for such cycles."""
    yield
    if len(os.listdir("/proc/self/fd")) > OPEN_FILES:
        gc.collect()


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 32 pieces."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, size=rng.integers(2, 9))) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=32, minloglevel=2
    )
    return folder / "tokenizer.model"


@pytest.fixture
def model_config(tokenizer_model: Path):
    """A function that gives the ``model`` node of a very small network; keywords replace top-level keys."""

    def build(**changes: Any):
        from omegaconf import OmegaConf

        node = {
            "seed": 3,
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "sample_rate": 16000,
                "normalize": "per_feature",
                "window_size": 0.025,
                "window_stride": 0.01,
                "features": 80,
                "dither": 0.0,
                "pad_to": 0,
            },
            "tokenizer": {"model_path": str(tokenizer_model)},
            "conformer": {"d_model": 32, "d_ff": 64, "n_heads": 2, "conv_norm_groups": 4, "dropout": 0.0},
            "speech_encoder": {"num_layers": 1, "conv_channels": 4},
            "text_encoder": {"vocab_size": 48, "dropout": 0.0},
            "multimodal_encoder": {"num_layers": 1},
            "quantizer": {"num_codes": 16, "code_dim": 24, "logit_init_std": 0.5},
            "speech_loss": {"num_distractors": 7},
            "pad_multiple": 8,
            "objectives": {"masked_speech": {}, "masked_text": {}, "translation_lm": {}, "matching": {}},
        }
        return OmegaConf.create({**node, **changes})

    return build


@pytest.fixture
def make_batch():
    """A function (speech seconds, text lengths, (pair seconds, tokens, negative tokens)) -> StepBatch of noise."""
    from nemo_slam.data.batch import PairBatch, SpeechBatch, StepBatch, TextBatch

    def audio(seconds, generator):
        lengths = torch.tensor([int(16000 * s) for s in seconds], dtype=torch.int64)
        waves = torch.randn(len(seconds), int(lengths.max()) if len(seconds) else 0, generator=generator) * 0.1
        mask = torch.arange(waves.shape[1]) < lengths[:, None]
        return waves * mask, lengths

    def tokens(lengths, generator):
        return torch.randint(0, 48, (sum(lengths),), generator=generator), torch.tensor(lengths, dtype=torch.int64)

    def build(speech=(0.6, 1.0, 1.7), text=(9, 14, 30), pairs=((0.8, 5, 7), (1.4, 12, 10)), seed=0):
        g = torch.Generator().manual_seed(seed)

        def identity(count):
            return {"ids": torch.arange(count) + 100, "epochs": torch.zeros(count, dtype=torch.int64)}

        waves, wave_lengths = audio(speech, g)
        ids, text_lengths = tokens(list(text), g)
        pair_waves, pair_lengths = audio([p[0] for p in pairs], g)
        own, own_lengths = tokens([p[1] for p in pairs], g)
        other, other_lengths = tokens([p[2] for p in pairs], g)
        texts = own, own_lengths, other, other_lengths, torch.arange(len(pairs))
        return StepBatch(
            step=0,
            speech=SpeechBatch(waves, wave_lengths, **identity(len(speech))),
            text=TextBatch(ids, text_lengths, **identity(len(text))),
            pairs=PairBatch(pair_waves, pair_lengths, *texts, **identity(len(pairs))),
        )

    return build


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up corpus: 24 utterances in which each word of WORDS is a tone of 100 ms, their manifests, and text."""
    import json

    import soundfile

    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(1)
    time = np.arange(1600) / 16000
    rows = []
    for i in range(24):
        words = rng.choice(len(WORDS), size=rng.integers(4, 12))
        wave = np.concatenate([np.sin(2 * np.pi * (200 + 150 * w) * time) for w in words])
        wave = 0.1 * wave + 0.01 * rng.standard_normal(len(wave))
        soundfile.write(folder / f"{i}.wav", wave.astype(np.float32), 16000)
        text = " ".join(WORDS[w] for w in words)
        rows.append({"audio_filepath": f"{i}.wav", "duration": len(wave) / 16000, "text": text, "lang": "en"})
    for name, part in (("train", rows[:18]), ("dev", rows[18:])):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
        lines = [" ".join(rng.choice(WORDS, size=rng.integers(2, 9))) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def pretrain_config(corpus: Path, tokenizer_model: Path, tmp_path: Path):
    """A function (stage, *overrides) -> the composed config of a run of seconds on the made-up corpus."""
    from hydra import compose, initialize_config_dir

    small = [
        "model=tiny",
        "data.prepare=null",
        f"data.root={corpus}",
        f"data.tokenizer.model_path={tokenizer_model}",
        *(
            f"data.{split}.{s}.manifest_filepath={corpus}/{part}.json"
            for split, part in (("train_ds", "train"), ("validation_ds", "dev"))
            for s in ("speech", "pairs")
        ),
        *(
            f"data.{split}.text.text_filepath={corpus}/{part}.txt"
            for split, part in (("train_ds", "train"), ("validation_ds", "dev"))
        ),
        "data.train_ds.speech.frames_per_step=400",
        "data.train_ds.pairs.frames_per_step=200",
        "data.train_ds.text.tokens_per_step=60",
        "data.num_workers=0",
        "model.conformer={d_model: 32, d_ff: 64, n_heads: 2, conv_norm_groups: 4, dropout: 0.1}",
        "model.speech_encoder={num_layers: 1, conv_channels: 4}",
        "model.multimodal_encoder.num_layers=1",
        "model.text_encoder={vocab_size: 40, dropout: 0.1}",
        "model.quantizer.num_codes=16",
        "model.quantizer.code_dim=24",
        "model.optim.sched.warmup_steps=4",
        "trainer.max_steps=12",
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=5",
        "checkpoint.every_n_steps=4",
    ]

    def build(stage: int | str, *overrides: str):
        with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
            name = f"slam_stage{stage}" if isinstance(stage, int) else stage
            return compose(name, [*small, f"exp_manager.exp_dir={tmp_path}", *overrides])

    return build
