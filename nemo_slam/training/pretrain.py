"""From a config to a finished run folder; ``scripts/speech_pretrain.py`` calls :func:`pretrain`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_slam.archive import for_any_machine, read_config, read_tokenizer
from nemo_slam.config import ConfigError, parse
from nemo_slam.data.bad_rows import BadRows
from nemo_slam.data.loader import build_streams
from nemo_slam.data.pairs import PairStream
from nemo_slam.data.stream import Stream
from nemo_slam.data.text import TextStream
from nemo_slam.evaluation.probes import Probes
from nemo_slam.models.pretraining import SLAMPretrainingModel
from nemo_slam.training.agreement import Agreement, facts
from nemo_slam.training.checkpoints import (
    StepCheckpoint,
    checkpoint_callback,
    exit_if_terminated,
    finished_checkpoints,
    seed_dropout,
)
from nemo_slam.training.data_module import SLAMDataModule
from nemo_slam.training.guards import StepGuard, disk_advice, memory_advice
from nemo_slam.training.initialise import load_weights, read_weights
from nemo_slam.training.lost_ranks import LostRanks
from nemo_slam.training.parallel import ParallelConfig, ShardedStrategy, make_strategy, refuse_strangers, whole_weights
from nemo_slam.training.precision import ScalingState, check_run
from nemo_slam.training.run_folder import RunMetrics, SavedConfig, make_run_folder, stop_keeping_log_lines
from nemo_slam.training.run_lock import alone_in
from nemo_slam.training.settings import ConfiguredSettings

MINIMUM_INITIALISED = 0.5
"""Share of the parameters that ``init_from`` must fill: objectives may be new, the encoder must not be."""


def prepare_data(data: DictConfig, vocab_size: int) -> None:
    """Prepare the corpus and its tokenizer on first use, where the config names a recipe.

    Raises:
        FileNotFoundError: no recipe, and the tokenizer does not exist.
    """
    from nemo_slam.data.corpora import prepare
    from nemo_slam.data.tokenizer import ensure_tokenizer

    if data.prepare is not None:
        prepare(data.prepare, data.root)
    if Path(data.tokenizer.model_path).is_file():
        return
    if data.prepare is None:
        raise FileNotFoundError(
            f"data.tokenizer.model_path: {data.tokenizer.model_path} does not exist; train one with "
            "scripts/train_tokenizer.py"
        )
    folder = ensure_tokenizer(data.root, vocab_size)
    if not Path(data.tokenizer.model_path).is_file():
        raise FileNotFoundError(
            f"data.tokenizer.model_path: {data.tokenizer.model_path} does not exist; the recipe's own tokenizer "
            f"is in {folder}"
        )


def make_loggers(node: DictConfig, run_folder: Path) -> list[Logger]:
    """TensorBoard and Weights & Biases by the flags of NeMo's experiment manager.

    The manager itself would move what lies in the run folder away at every start, ``metrics.csv`` included.
    """
    loggers: list[Logger] = []
    if node.create_tensorboard_logger:
        loggers.append(TensorBoardLogger(save_dir=run_folder, name="", version=""))
    if node.create_wandb_logger:
        loggers.append(
            WandbLogger(save_dir=run_folder, **OmegaConf.to_container(node.wandb_logger_kwargs, resolve=True))
        )
    return loggers


def make_trainer(cfg: DictConfig, run_folder: Path, metrics: RunMetrics, *others: Callback) -> Trainer:
    """Lightning's trainer with our checkpoints, metrics and loggers.

    Raises:
        ConfigError: no number of steps, a limit on batches, or processes that do not know of each other.
    """
    steps, batches = cfg.trainer.get("max_steps", -1), cfg.trainer.get("limit_train_batches", 1.0)
    if steps is None or steps < 1:
        raise ConfigError(
            f"trainer.max_steps must be positive, got {steps}: streams have no end. +trainer.max_time=DD:HH:MM:SS ends "
            "a run earlier"
        )
    if batches != 1.0 or isinstance(batches, int):  # Lightning would begin again at the first of them, and again
        raise ConfigError("trainer.limit_train_batches: a run is one endless epoch; set trainer.max_steps instead")
    callbacks = [
        # Metrics before checkpoints: a checkpoint at step k then implies that row k is written.
        metrics,
        StepCheckpoint(run_folder / "checkpoints", cfg.checkpoint.every_n_steps, cfg.checkpoint.keep_last),
        ScalingState(),
        ConfiguredSettings(),
        *others,
    ]
    trainer = Trainer(
        **OmegaConf.to_container(cfg.trainer, resolve=True),
        strategy=make_strategy(parse(ParallelConfig, cfg.parallel, "parallel"), cfg.trainer),
        callbacks=callbacks,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=make_loggers(cfg.exp_manager, run_folder),
    )
    refuse_strangers(trainer)
    return trainer


def start_up_table(
    trainer: Trainer, model: SLAMPretrainingModel, numbers: list[tuple[str, str]], streams: dict[str, Stream]
) -> str:
    """What this run is, in one look. ``numbers`` are :func:`nemo_slam.training.precision.check_run`'s rows."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in model.parameters())
    rows = [
        ("device", f"{name}; {trainer.world_size} process(es)"),
        *numbers,
        ("parameters", f"{parameters / 1e6:.2f} M"),
        ("objectives", ", ".join(model.objectives)),
        ("steps", f"{trainer.max_steps}, {trainer.accumulate_grad_batches} micro-batch(es) each"),
        *((f"stream {name}", stream.summary()) for name, stream in streams.items()),
    ]
    width = max(len(title) for title, _ in rows)
    return "\n".join(["run:", *(f"  {title:<{width}}  {text}" for title, text in rows)])


def _say_demonstration(cfg: DictConfig, trainer: Trainer) -> None:
    if cfg.data.prepare is None or cfg.model.conformer.d_model < 512:
        return
    logging.warning("=" * 100)
    logging.warning(
        f"DEMONSTRATION: this trains on the small corpus {cfg.data.prepare!r}. For real training name your "
        "data: data=..."
    )
    if trainer.strategy.root_device.type == "cpu":
        logging.warning(
            "This machine has no GPU: a step of this model takes half a minute or more. model=tiny is meant for a CPU."
        )
    logging.warning("=" * 100)


def save_nemo(model: Any, path: Path) -> None:
    """Write a ``.nemo`` under another name, then rename it: a kill leaves no half archive.

    What its config chose for this machine is left open in it.
    """
    for_any_machine(model.cfg)
    part = path.with_name(f".{path.stem}.part.nemo")
    trainer: Trainer | None = model.trainer
    with disk_advice(path.parent), whole_weights(model):
        if trainer is None or trainer.is_global_zero:  # NeMo writes on this rank alone, and no rank waits
            model.save_to(str(part))
            os.replace(part, path)
    if trainer is not None:
        trainer.strategy.barrier()


def pretrain(cfg: DictConfig) -> Path:
    """Run (or resume) pre-training and return the run folder."""
    started = time.perf_counter()
    seed_everything(cfg.seed, verbose=False)
    run_folder = make_run_folder(cfg)
    others: list[Callback] = [] if cfg.guard is None else [StepGuard(run_folder, **cfg.guard)]
    if cfg.probes:
        others.append(Probes())
    trainer = make_trainer(cfg, run_folder, RunMetrics(run_folder, cfg.trainer.log_every_n_steps), *others)
    with alone_in(run_folder, trainer.is_global_zero):
        _say_demonstration(cfg, trainer)
        prepare_data(cfg.data, cfg.model.text_encoder.vocab_size)
        model = SLAMPretrainingModel(OmegaConf.create(OmegaConf.to_container(cfg.model, resolve=True)), trainer)
        numbers = check_run(
            model,
            model.settings.conformer,
            model.settings.pad_multiple,
            cfg.model.optim.name,
            str(trainer.precision),
            trainer.strategy.root_device,
            sharded=isinstance(trainer.strategy, ShardedStrategy),
        )

        seed_dropout(cfg.seed, trainer.global_rank)

        bad_rows = BadRows(run_folder / "bad_rows.jsonl", cfg.data.on_bad_row)
        common = {"seed": cfg.seed, "tokenizer": model.tokenizer_model, "bad_rows": bad_rows}
        train = build_streams(_needed(cfg.model.train_ds, model.streams, "train_ds"), **common)
        vocab_size = cfg.model.text_encoder.vocab_size
        texts = {n: s.token_counts(vocab_size) for n, s in train.items() if isinstance(s, (TextStream, PairStream))}
        model.set_unigrams({name: torch.from_numpy(counts) for name, counts in texts.items()})
        validation = {}
        if cfg.model.validation_ds is not None:
            node = _needed(cfg.model.validation_ds, model.streams, "validation_ds")
            validation = build_streams(node, **common, split="validation")
        pin = trainer.strategy.root_device.type == "cuda"
        data = SLAMDataModule(train, validation, cfg.data.num_workers, pin)
        checkpoint_callback(trainer).identity = data_identity(cfg, train)

        checkpoints = finished_checkpoints(run_folder / "checkpoints")
        resume = checkpoints[-1] if checkpoints else None
        if resume is not None:
            logging.info(f"resuming from step {resume[0]} ({resume[1]})")
        elif cfg.init_from is not None:
            logging.info(str(load_weights(model, read_weights(cfg.init_from), cfg.init_from, MINIMUM_INITIALISED)))
            check_same_tokenizer(Path(cfg.init_from), model.tokenizer_model)
        if trainer.is_global_zero:
            logging.info(start_up_table(trainer, model, numbers, train))

        fit(cfg, trainer, model, data, train, validation, resume, cfg)
        if trainer.global_step >= trainer.max_steps:
            save_nemo(model, run_folder / f"{cfg.name}.nemo")
    if trainer.is_global_zero:
        minutes = (time.perf_counter() - started) / 60
        left_out = f"; {bad_rows.count()} bad rows, listed in {bad_rows.path}" if bad_rows.count() else ""
        logging.info(
            f"step {trainer.global_step}/{trainer.max_steps} after {minutes:.1f} min; run folder: "
            f"{run_folder}{left_out}"
        )
    return run_folder


def fit(
    cfg: DictConfig,
    trainer: Trainer,
    model: LightningModule,
    data: LightningDataModule,
    train: dict[str, Stream],
    validation: dict[str, Stream],
    resume: tuple[int, Path] | None,
    saved: DictConfig,
) -> None:
    """Train, on ranks that were started alike, and explain what went wrong with memory or with a rank.

    Args:
        train, validation: open streams by name.
        resume: step and path of the checkpoint to go on from.
        saved: what ``config.yaml`` is to hold.
    """
    validated = {f"validation {name}": stream.index.meta["digest"] for name, stream in validation.items()}
    # A rank that does not see the others' checkpoints would start from the beginning: nodes without a shared folder.
    found = {"resume from step": None if resume is None else resume[0]}
    trainer.callbacks.insert(0, Agreement(facts(cfg, {**data_identity(cfg, train), **validated, **found})))
    lost_ranks = LostRanks(parse(ParallelConfig, cfg.parallel, "parallel").lost_after_seconds)
    trainer.callbacks.insert(0, lost_ranks)
    run_folder = Path(cfg.exp_manager.exp_dir) / cfg.name
    trainer.callbacks.append(SavedConfig(saved, run_folder))
    stop_keeping_log_lines()
    with memory_advice(cfg), disk_advice(run_folder), lost_ranks:
        trainer.fit(model, datamodule=data, ckpt_path=None if resume is None else str(resume[1]))
    exit_if_terminated(trainer)


def check_same_tokenizer(start: Path, tokenizer: Path) -> None:
    """The text embedding of ``init_from`` stands for the pieces that it was trained with.

    Raises:
        ValueError: those of another tokenizer.
    """
    if start.suffix != ".nemo":
        logging.warning(f"init_from: {start} holds no tokenizer, so it cannot be compared with {tokenizer}")
    elif read_tokenizer(start, read_config(start)) != tokenizer.read_bytes():
        raise ValueError(
            f"init_from: {start} was trained with another tokenizer than {tokenizer}: its text embedding would stand "
            f"for other pieces. Name its own as data.tokenizer.model_path; it lies in that archive (tar -tf {start})"
        )


def data_identity(cfg: DictConfig, streams: dict[str, Stream]) -> dict[str, Any]:
    """What decides which examples a step holds; a resume with anything else would not be one."""
    of_streams = {
        f"stream {name}": [stream.index.meta["digest"], stream.sampler.frames_per_step, stream.sampler.window]
        for name, stream in streams.items()
    }
    return {"seed": cfg.seed, **of_streams}


def _needed(node: DictConfig, streams: tuple[str, ...], where: str) -> dict[str, Any]:
    """The streams that the objectives read, of those that the data config offers."""
    missing = [name for name in streams if node.get(name) is None]
    if missing:
        raise ValueError(f"data.{where} lacks {', '.join(missing)}: the enabled objectives need {', '.join(streams)}")
    return {name: OmegaConf.to_container(node[name], resolve=True) for name in streams}
