"""From a config to a fine-tuned stock model; ``scripts/speech_finetune.py`` calls :func:`finetune`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from nemo.collections.asr.losses.ctc import CTCLoss
from nemo.core.classes import ModelPT
from nemo.utils import logging
from nemo.utils.model_utils import import_class_by_path
from omegaconf import DictConfig, OmegaConf

from nemo_slam.data.bad_rows import BadRows, EmptyStreamError
from nemo_slam.data.manifest import expand_paths
from nemo_slam.data.tokenizer import train_on_lines
from nemo_slam.finetuning.loader import FineTuningData
from nemo_slam.finetuning.metrics import FineTuneMetrics
from nemo_slam.finetuning.pretrained import Pretrained, encoder_node, initialise_encoder, read_pretrained
from nemo_slam.finetuning.schedule import FreezeEncoder
from nemo_slam.finetuning.stopping import EarlyStopping
from nemo_slam.finetuning.transcripts import Limits, TranscriptStream, read_texts
from nemo_slam.training.checkpoints import finished_checkpoints
from nemo_slam.training.pretrain import make_trainer, save_nemo

MINIMUM_INITIALISED = 0.95
"""Share of the encoder's parameters that ``init_from`` must fill."""


def prepare_corpus(data: DictConfig) -> None:
    """Prepare the corpus on first use, where the config names a recipe.

    Raises:
        FileNotFoundError: a manifest does not exist.
    """
    if data.prepare is not None:
        from nemo_slam.data.corpora import prepare

        prepare(data.prepare, data.root)
    for split in ("train_ds", "validation_ds"):
        for path in _manifests(data, split):
            if not path.is_file():
                there = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
                known = f"; in {path.parent} there are {', '.join(there)}" if there else ""
                raise FileNotFoundError(
                    f"data.{split}.manifest_filepath: {path} does not exist{known}. Name another manifest, or the "
                    "language (data.language) of one that is there"
                )


def _manifests(data: DictConfig, split: str) -> list[Path]:
    node = data.get(split)
    if node is None:
        return []
    paths = node.manifest_filepath
    return expand_paths([paths] if isinstance(paths, str) else list(paths))


def check_tokenizer(folder: str | Path, where: str) -> Path:
    """The folder, which must hold what NeMo's BPE models read.

    Raises:
        FileNotFoundError: it does not.
    """
    for name in ("tokenizer.model", "tokenizer.vocab", "vocab.txt"):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(
                f"{where}: {folder} holds no {name}; train a tokenizer with scripts/train_tokenizer.py"
            )
    return Path(folder)


def tokenizer_dir(cfg: DictConfig, run_folder: Path) -> Path:
    """The folder of ``model.tokenizer.dir``, or one in the run folder, trained on the training manifest's targets.

    Raises:
        FileNotFoundError: the named folder holds no tokenizer.
    """
    if cfg.model.tokenizer.dir is not None:
        return check_tokenizer(cfg.model.tokenizer.dir, "model.tokenizer.dir")
    folder = run_folder / "tokenizer"
    if not (folder / "tokenizer.model").is_file():
        key, manifests = cfg.data.train_ds.text_key, _manifests(cfg.data, "train_ds")
        texts = list(read_texts(manifests, key))
        if not texts:
            names = ", ".join(map(str, manifests))
            raise EmptyStreamError(f"data.train_ds: no row of {names} has a string {key!r} (data.train_ds.text_key)")
        options = {"allow_smaller": True, "sequence_symbols": cfg.tokenizer.sequence_symbols}
        train_on_lines(texts, folder, cfg.tokenizer.vocab_size, **options)
    return folder


def model_node(cfg: DictConfig, pretrained: Pretrained | None, tokenizer: Path) -> DictConfig:
    """The stock model's own config: nothing in it that NeMo does not read."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))  # interpolations are kept: they may name the encoder's width
    encoder = OmegaConf.to_container(cfg.model.encoder, resolve=True)
    cfg.model.encoder = encoder_node(encoder, pretrained)
    if pretrained is not None:
        cfg.model.preprocessor = pretrained.preprocessor
    cfg.model.tokenizer.dir = str(tokenizer)
    cfg.model.train_ds = cfg.model.validation_ds = None  # the loaders are ours, see stock_datasets()
    return OmegaConf.create(OmegaConf.to_container(cfg.model, resolve=True))


def stock_datasets(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The data in NeMo's own keys: ``transcribe()`` reads some of them, NeMo's scripts begin from them."""
    nodes = {}
    for split in ("train_ds", "validation_ds"):
        manifests = [str(path) for path in _manifests(cfg.data, split)]
        nodes[split] = {
            "manifest_filepath": manifests[0] if len(manifests) == 1 else manifests or None,
            "sample_rate": cfg.model.sample_rate,
            "batch_size": 8,
            "shuffle": split == "train_ds",
            "num_workers": 0,
            "pin_memory": True,
            "use_start_end_token": False,
        }
    return nodes


def start_up_table(
    trainer: Trainer, model: ModelPT, cfg: DictConfig, streams: dict[str, TranscriptStream | None]
) -> str:
    """What this run is, in one look."""
    encoder = sum(p.numel() for p in model.encoder.parameters())
    everything = sum(p.numel() for p in model.parameters())
    groups, lr = cfg.model.optim_param_groups, cfg.model.optim.lr
    rows = [
        ("model", type(model).__name__),
        ("device", f"{trainer.strategy.root_device}; {trainer.world_size} process(es)"),
        ("precision", str(trainer.precision)),
        ("parameters", f"{everything / 1e6:.2f} M, {encoder / 1e6:.2f} M of them in the encoder"),
        ("tokenizer", f"{model.tokenizer.vocab_size} pieces, {cfg.model.tokenizer.dir}"),
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
    """Run (or resume) fine-tuning and return the run folder; it ends with ``name.nemo``, a stock model."""
    started = time.perf_counter()
    seed_everything(cfg.seed, verbose=False)
    run_folder = Path(cfg.exp_manager.exp_dir) / cfg.name
    run_folder.mkdir(parents=True, exist_ok=True)
    pretrained = None if cfg.init_from is None else read_pretrained(cfg.init_from)
    prepare_corpus(cfg.data)
    metrics = FineTuneMetrics(run_folder, cfg.trainer.log_every_n_steps)
    stopping = make_early_stopping(cfg, run_folder)
    # Early stopping comes first, so that a checkpoint holds what it knows.
    trainer = make_trainer(cfg, run_folder, metrics, FreezeEncoder(cfg.freeze_encoder_steps), *stopping)
    tokenizer = tokenizer_dir(cfg, run_folder)
    node = model_node(cfg, pretrained, tokenizer)
    model = import_class_by_path(node.target)(cfg=node, trainer=trainer)

    bad_rows = BadRows(run_folder / "bad_rows.jsonl", cfg.data.on_bad_row)
    limits = limits_of(model)
    streams = {split: _stream(cfg, split, tokenizer, bad_rows, limits) for split in ("train", "validation")}
    pin = trainer.strategy.root_device.type == "cuda"
    data = FineTuningData(streams["train"], streams["validation"], cfg.data.num_workers, pin, special_tokens(model))

    checkpoints = finished_checkpoints(run_folder / "checkpoints")
    resume = checkpoints[-1] if checkpoints else None
    if resume is not None:
        logging.info(f"resuming from step {resume[0]} ({resume[1]})")
    elif pretrained is not None:
        logging.info(f"encoder of {pretrained.path}: {pretrained.describe()}")
        logging.info(str(initialise_encoder(model.encoder, pretrained, MINIMUM_INITIALISED)))
    for split, stock in stock_datasets(cfg).items():
        model.cfg[split] = stock
    if trainer.is_global_zero:
        resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        resolved.model = {key: node.get(key, value) for key, value in resolved.model.items()}
        OmegaConf.save(resolved, run_folder / "config.yaml")
        logging.info(start_up_table(trainer, model, resolved, streams))

    trainer.fit(model, datamodule=data, ckpt_path=None if resume is None else str(resume[1]))

    if trainer.global_step >= trainer.max_steps or any(callback.stopped for callback in stopping):
        for callback in stopping:
            logging.info(f"weights of step {callback.restore_best(model)}, the best by {callback.monitor}")
        save_nemo(model, run_folder / f"{cfg.name}.nemo")
    if trainer.is_global_zero:
        minutes = (time.perf_counter() - started) / 60
        left_out = f"; {bad_rows.count()} bad rows, listed in {bad_rows.path}" if bad_rows.count() else ""
        reached = f"step {trainer.global_step}/{trainer.max_steps} after {minutes:.1f} min"
        logging.info(f"{reached}; run folder: {run_folder}{left_out}")
    return run_folder


def limits_of(model: ModelPT) -> Limits:
    """What the model can learn from: CTC (itself, or beside a transducer) and attention decoders are limited."""
    uses_ctc = any(isinstance(getattr(model, name, None), CTCLoss) for name in ("loss", "ctc_loss"))
    positions = model.transf_decoder.max_sequence_length if hasattr(model, "transf_decoder") else None
    return Limits(
        ctc_frame=model.encoder.subsampling_factor if uses_ctc else None,
        max_tokens=None if positions is None else positions - 2,
    )


def special_tokens(model: ModelPT) -> dict[str, int]:
    """What attention decoders want around a text, for ``loader.collate``; nothing for other models.

    Raises:
        ValueError: the tokenizer lacks them.
    """
    if not hasattr(model, "transf_decoder"):
        return {}
    tokens = {"pad_id": model.tokenizer.pad_id, "start_id": model.tokenizer.bos_id, "end_id": model.tokenizer.eos_id}
    if min(tokens.values()) < 0:
        raise ValueError(
            "model.tokenizer.dir: this tokenizer has no <s>, </s> and <pad>, which attention decoders need; train one "
            "with scripts/train_tokenizer.py --sequence-symbols, or set model.tokenizer.dir=null"
        )
    return tokens


def _stream(cfg: DictConfig, split: str, tokenizer: Path, bad_rows: BadRows, limits: Limits) -> TranscriptStream | None:
    node = cfg.data.get(f"{split}_ds")
    if node is None:
        return None
    return TranscriptStream(
        OmegaConf.to_container(node, resolve=True),
        tokenizer / "tokenizer.model",
        seed=cfg.seed,
        limits=limits,
        bad_rows=bad_rows,
        name=split,
    )
