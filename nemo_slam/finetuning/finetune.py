"""From a config to a fine-tuned model; ``scripts/speech_finetune.py`` calls :func:`finetune`."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from nemo.core.classes import ModelPT
from nemo.utils import logging
from nemo.utils.model_utils import import_class_by_path
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_slam.config import ConfigError, parse
from nemo_slam.data.bad_rows import BadRows
from nemo_slam.data.stream import Stream
from nemo_slam.finetuning.loader import FineTuningData
from nemo_slam.finetuning.metrics import FineTuneMetrics
from nemo_slam.finetuning.pretrained import initialise_encoder, read_pretrained
from nemo_slam.finetuning.schedule import FreezeEncoder
from nemo_slam.finetuning.speech_task import SpeechTask
from nemo_slam.finetuning.stopping import EarlyStopping
from nemo_slam.finetuning.task import Task, plain, prepare_corpus
from nemo_slam.finetuning.text_tasks import ClassificationTask, TranslationTask
from nemo_slam.modules.conformer import ConformerConfig
from nemo_slam.training.checkpoints import checkpoint_callback, finished_checkpoints, seed_dropout
from nemo_slam.training.precision import check_run
from nemo_slam.training.pretrain import data_identity, fit, make_trainer, save_nemo
from nemo_slam.training.run_folder import make_run_folder
from nemo_slam.training.run_lock import alone_in

MINIMUM_INITIALISED = 0.95
"""Share of the encoder's parameters that ``init_from`` must fill."""

TEXT_TASKS: dict[str, type[Task]] = {
    "nemo_slam.finetuning.translation.SLAMTranslationModel": TranslationTask,
    "nemo_slam.finetuning.classification.SLAMClassificationModel": ClassificationTask,
}
"""By ``model.target``; every other model is a stock one with speech in."""


def start_up_table(
    trainer: Trainer, model: ModelPT, cfg: DictConfig, task: Task, streams: dict[str, Stream | None]
) -> str:
    """What this run is, in one look."""
    encoder = sum(p.numel() for p in model.encoder.parameters())
    everything = sum(p.numel() for p in model.parameters())
    groups, lr = cfg.model.optim_param_groups, cfg.model.optim.lr
    device, node = trainer.strategy.root_device, cfg.model.encoder
    conformer = parse(ConformerConfig, node.conformer, "model.encoder.conformer")
    precision = str(trainer.precision)
    rows = [
        ("model", type(model).__name__),
        ("device", f"{device}; {trainer.world_size} process(es)"),
        *check_run(model.encoder, conformer, node.pad_multiple, cfg.model.optim.name, precision, device),
        ("parameters", f"{everything / 1e6:.2f} M, {encoder / 1e6:.2f} M of them in the encoder"),
        *task.describe(model),
        ("learning rates", f"encoder {groups.encoder.lr:g} from step {cfg.freeze_encoder_steps}, the rest {lr:g}"),
        ("steps", f"{trainer.max_steps}, {trainer.accumulate_grad_batches} micro-batch(es) each"),
        *((f"{name} data", stream.summary()) for name, stream in streams.items() if stream is not None),
    ]
    width = max(len(title) for title, _ in rows)
    return "\n".join(["run:", *(f"  {title:<{width}}  {text}" for title, text in rows)])


def make_early_stopping(cfg: DictConfig, run_folder: Path) -> list[EarlyStopping]:
    """The callback that the config asks for, if it does."""
    node = cfg.early_stopping
    if node.patience is None:
        return []
    if cfg.data.validation_ds is None:
        raise ValueError("early_stopping.patience needs data.validation_ds: there is nothing to monitor")
    return [EarlyStopping(run_folder / "checkpoints", node.patience, node.monitor, node.mode)]


def finetune(cfg: DictConfig) -> Path:
    """Run (or resume) fine-tuning and return the run folder; it ends with ``name.nemo``."""
    started = time.perf_counter()
    if cfg.parallel.get("strategy", "ddp") != "ddp":
        raise ConfigError(
            f"parallel.strategy={cfg.parallel.strategy} is for pre-training alone: stock models go around the "
            "forward by which shards are gathered. Leave it at ddp"
        )
    if cfg.reinit_last_layers and cfg.init_from is None:
        raise ConfigError("reinit_last_layers goes with init_from: without it every layer is random")
    seed_everything(cfg.seed, verbose=False)
    run_folder = make_run_folder(cfg)
    make_task = TEXT_TASKS.get(cfg.model.target, SpeechTask)
    kind = "speech" if make_task is SpeechTask else "text"
    pretrained = None if cfg.init_from is None else read_pretrained(cfg.init_from, kind)
    prepare_corpus(cfg.data)
    task = make_task(cfg, run_folder, pretrained)
    metrics = FineTuneMetrics(run_folder, cfg.trainer.log_every_n_steps, task.volume)
    stopping = make_early_stopping(cfg, run_folder)
    freeze = FreezeEncoder(cfg.freeze_encoder_steps)
    # Early stopping comes first, so that a checkpoint holds what it knows.
    trainer = make_trainer(cfg, run_folder, metrics, freeze, *stopping)
    with alone_in(run_folder, trainer.is_global_zero):
        node = task.model_node()
        model = import_class_by_path(node.target)(cfg=node, trainer=trainer)
        seed_dropout(cfg.seed, trainer.global_rank)

        bad_rows = BadRows(run_folder / "bad_rows.jsonl", cfg.data.on_bad_row)
        streams = {split: task.stream(model, split, bad_rows) for split in ("train", "validation")}
        train = streams["train"]
        if train is None:
            raise ValueError("data.train_ds is null: there is nothing to train on")
        pin = trainer.strategy.root_device.type == "cuda"
        data = FineTuningData(train, streams["validation"], task.collate(model), cfg.data.num_workers, pin)
        checkpoint_callback(trainer).identity = data_identity(cfg, {"train": train})

        checkpoints = finished_checkpoints(run_folder / "checkpoints")
        resume = checkpoints[-1] if checkpoints else None
        if resume is not None:
            logging.info(f"resuming from step {resume[0]} ({resume[1]})")
        elif pretrained is not None:
            logging.info(f"encoder of {pretrained.path}: {pretrained.describe()}")
            last = cfg.reinit_last_layers
            logging.info(str(initialise_encoder(model.encoder, pretrained, MINIMUM_INITIALISED, last)))
            if last:
                logging.info(
                    f"reinit_last_layers: the last {last} multimodal layer(s) keep their random weights instead"
                )
        with open_dict(model.cfg):
            for split, stock in task.stock_datasets().items():
                model.cfg[split] = stock
        resolved: DictConfig = OmegaConf.create(plain(cfg))
        resolved.model = {**resolved.model, **node}
        table = start_up_table(trainer, model, resolved, task, streams)  # what cannot be had is an error on every rank
        if trainer.is_global_zero:
            logging.info(table)

        validation = streams["validation"]
        validated = {} if validation is None else {"validation": validation}
        fit(cfg, trainer, model, data, {"train": train}, validated, resume, resolved)
        if trainer.global_step >= trainer.max_steps or any(callback.stopped for callback in stopping):
            for callback in stopping:
                best = callback.restore_best(model)
                if best < 0:
                    logging.warning(f"no validation gave a number for {callback.monitor}: the last weights are kept")
                else:
                    logging.info(f"weights of step {best}, the best by {callback.monitor}")
            with open_dict(model.cfg):  # NeMo would give the file's groups to later runs, over the rate that they set
                model.cfg.pop("optim_param_groups", None)
            save_nemo(model, run_folder / f"{cfg.name}.nemo")
    if trainer.is_global_zero:
        minutes = (time.perf_counter() - started) / 60
        left_out = f"; {bad_rows.count()} bad rows, listed in {bad_rows.path}" if bad_rows.count() else ""
        reached = f"step {trainer.global_step}/{trainer.max_steps} after {minutes:.1f} min"
        logging.info(f"{reached}; run folder: {run_folder}{left_out}")
    return run_folder
