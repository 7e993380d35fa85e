"""A very small pre-training run in processes of its own, for ``faults.py`` to hurt: corpus, config, comparison."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CONF = Path(__file__).resolve().parents[1] / "conf"
STEPS, SAVE_EVERY = 16, 4
CLOCK = {"frames_per_second", "tokens_per_second", "seconds"}
WORDS = ("one", "two", "three", "press", "star", "the", "number", "of", "call", "please", "hold", "line")
PATIENCE = 300.0
"""Seconds without a new step after which a process counts as hanging; a busy machine may take long to start one."""


def make_corpus(folder: Path) -> None:
    """24 utterances in which each word is a tone of 100 ms, their manifests, text and a tokenizer of 32 pieces."""
    import sentencepiece
    import soundfile

    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(1), []
    moments = np.arange(1600) / 16000
    for i in range(24):
        words = rng.choice(len(WORDS), size=rng.integers(4, 12))
        wave = 0.1 * np.concatenate([np.sin(2 * np.pi * (200 + 150 * w) * moments) for w in words])
        soundfile.write(folder / f"{i}.wav", (wave + 0.01 * rng.standard_normal(len(wave))).astype(np.float32), 16000)
        text = " ".join(WORDS[w] for w in words)
        rows.append({"audio_filepath": f"{i}.wav", "duration": len(wave) / 16000, "text": text, "lang": "en"})
    for name, part in (("train", rows[:18]), ("dev", rows[18:])):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
        lines = [" ".join(rng.choice(WORDS, size=rng.integers(2, 9))) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "train.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=32, minloglevel=2
    )


def config(corpus: Path, runs: Path, name: str, *overrides: str) -> Any:
    """Stage 2 of a model of a few thousand parameters, with dropout: 16 steps, a checkpoint every 4."""
    from hydra import compose, initialize_config_dir

    data = [
        f"data.{split}.{stream}.{key}={corpus}/{part}.{suffix}"
        for split, part in (("train_ds", "train"), ("validation_ds", "dev"))
        for stream, key, suffix in (
            ("speech", "manifest_filepath", "json"),
            ("pairs", "manifest_filepath", "json"),
            ("text", "text_filepath", "txt"),
        )
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            "slam_stage2",
            [
                "model=tiny",
                "data.prepare=null",
                f"data.root={corpus}",
                f"data.tokenizer.model_path={corpus}/tokenizer.model",
                *data,
                "data.train_ds.speech.frames_per_step=400",
                "data.train_ds.pairs.frames_per_step=200",
                "data.train_ds.text.tokens_per_step=60",
                "data.num_workers=1",
                "model.conformer={d_model: 32, d_ff: 64, n_heads: 2, conv_norm_groups: 4, dropout: 0.1}",
                "model.speech_encoder={num_layers: 1, conv_channels: 4}",
                "model.multimodal_encoder.num_layers=1",
                "model.text_encoder={vocab_size: 40, dropout: 0.1}",
                "model.quantizer={num_codes: 16, code_dim: 24}",
                "model.optim.sched.warmup_steps=4",
                f"trainer.max_steps={STEPS}",
                "trainer.log_every_n_steps=1",
                "trainer.val_check_interval=7",
                "trainer.accelerator=cpu",
                f"checkpoint.every_n_steps={SAVE_EVERY}",
                "exp_manager.create_tensorboard_logger=false",
                f"exp_manager.exp_dir={runs}",
                f"name={name}",
                *overrides,
            ],
        )


@dataclass
class Attempt:
    """A process group that trains, forked from this process, which has imported NeMo already."""

    folder: Path
    log: Path
    pids: list[int] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The last training step in metrics.csv."""
        return max((int(row["step"]) for row in rows(self.folder) if row.get("loss")), default=0)

    @property
    def resumed_from(self) -> int:
        found = re.findall(r"resuming from step (\d+)", self.log.read_text(errors="replace"))
        return int(found[0]) if found else 0

    def alive(self) -> list[int]:
        for pid in self.pids:
            if pid not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.statuses]

    def wait(self, until: Callable[[], bool] = lambda: False, patience: float = PATIENCE) -> bool:
        """Wait for the end, or for ``until``; False if there was no new step for ``patience`` seconds."""
        seen, since = -1, time.monotonic()
        while self.alive() and not until():
            if (steps := self.steps) != seen:
                seen, since = steps, time.monotonic()
            if time.monotonic() - since > patience:
                return False
            time.sleep(0.02)
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal every process that still runs; with SIGKILL also those that they started."""
        for pid in self.alive():
            (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)

    def finish(self) -> list[int]:
        """Exit statuses, after all have ended; what hangs is killed."""
        if not self.wait():
            self.kill()
        while self.alive():
            time.sleep(0.02)
        return [self.statuses[pid] for pid in self.pids]


def start(cfg: Any, log: Path, prepare: Callable[[int], None] | None = None, ranks: int = 1, port: int = 0) -> Attempt:
    """Train in ``ranks`` new processes.

    Args:
        prepare: called in each process before training, with its rank: it plants the fault.
        port: of the rendezvous, with several ranks.
    """
    attempt = Attempt(Path(cfg.exp_manager.exp_dir) / cfg.name, log)
    sys.stdout.flush()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _child(cfg, log, prepare, rank, ranks, port)
        attempt.pids.append(pid)
    return attempt


def _child(cfg: Any, log: Path, prepare: Callable[[int], None] | None, rank: int, ranks: int, port: int) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        out = os.open(log if rank == 0 else f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if ranks > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
            os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        if prepare is not None:
            prepare(rank)
        from nemo_slam.training.pretrain import pretrain

        pretrain(cfg)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# ---- what a run left ---------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what depends on the clock; a line that is being written is left out."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in found if None not in row.values()]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    from nemo_slam.training.checkpoints import finished_checkpoints

    return finished_checkpoints(folder / "checkpoints")


def difference(folder: Path, reference: Path) -> str:
    """What differs between two finished runs: weights of the last checkpoint bit for bit, and metrics; or nothing."""
    import torch

    if [step for step, _ in checkpoints(folder)][-1:] != [STEPS]:
        return f"no checkpoint of step {STEPS}"
    states = [torch.load(checkpoints(f)[-1][1], weights_only=False)["state_dict"] for f in (folder, reference)]
    wrong = [name for name in states[1] if not torch.equal(states[0][name], states[1][name])]
    if wrong:
        return f"{len(wrong)} of {len(states[1])} tensors differ, the first is {wrong[0]}"
    pairs = zip(rows(folder), rows(reference), strict=False)
    if len(rows(folder)) != len(rows(reference)):
        return f"metrics.csv has {len(rows(folder))} rows, not {len(rows(reference))}"
    return next((f"metrics.csv differs at step {a['step']}" for a, b in pairs if a != b), "")


def copy_corpus(source: Path, target: Path) -> Path:
    """A corpus of its own for one trial; indexes go with it, modification times too."""
    shutil.copytree(source, target)
    return target
