"""Fine-tuning with speech in: stock NeMo models around ``SLAMEncoder``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nemo.collections.asr.losses.ctc import CTCLoss
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf

from nemo_slam.data.audio import SAMPLE_RATE, check_sample_rate
from nemo_slam.data.bad_rows import BadRows
from nemo_slam.finetuning.loader import Collate
from nemo_slam.finetuning.pretrained import encoder_node
from nemo_slam.finetuning.task import Task, check_sequence_symbols, check_tokenizer, manifests, plain, train_once
from nemo_slam.finetuning.transcripts import Limits, TranscriptStream, collate, read_texts


class SpeechTask(Task):
    """A stock model: CTC, transducer, hybrid, or attention decoder."""

    volume = ("speech_per_second", 1 / SAMPLE_RATE)

    def tokenizer_dir(self) -> Path:
        """The folder of ``model.tokenizer.dir``, or one in the run folder, trained on the training manifest's targets.

        Raises:
            FileNotFoundError: the named folder holds no tokenizer.
        """
        cfg = self.cfg
        if cfg.model.tokenizer.dir is not None:
            return check_tokenizer(cfg.model.tokenizer.dir, "model.tokenizer.dir")
        options = {"model_type": cfg.tokenizer.model_type, "sequence_symbols": cfg.tokenizer.sequence_symbols}
        folder = self.run_folder / "tokenizer"
        return train_once(folder, cfg.data, "text_key", read_texts, cfg.tokenizer.vocab_size, **options)

    def model_node(self) -> DictConfig:
        """Nothing in it that NeMo does not read.

        Raises:
            ConfigError: features of another rate than audio is read at.
        """
        cfg = OmegaConf.create(OmegaConf.to_container(self.cfg))  # interpolations are kept: some name the width
        cfg.model.encoder = encoder_node(plain(cfg.model.encoder), self.pretrained)
        if self.pretrained is not None:
            cfg.model.preprocessor = self.pretrained.preprocessor
        check_sample_rate(cfg.model.sample_rate, "model.sample_rate")
        check_sample_rate(cfg.model.preprocessor.get("sample_rate", SAMPLE_RATE), "model.preprocessor.sample_rate")
        cfg.model.tokenizer.dir = str(self.tokenizer_dir())
        cfg.model.train_ds = cfg.model.validation_ds = None  # the loaders are ours, see stock_datasets()
        return OmegaConf.create(plain(cfg.model))

    def stream(self, model: ModelPT, split: str, bad_rows: BadRows) -> TranscriptStream | None:
        node = self.cfg.data.get(f"{split}_ds")
        if node is None:
            return None
        return TranscriptStream(
            plain(node),
            Path(model.cfg.tokenizer.dir) / "tokenizer.model",
            seed=self.cfg.seed,
            limits=limits_of(model),
            bad_rows=bad_rows,
            name=split,
        )

    def collate(self, model: ModelPT) -> Collate:
        if not hasattr(model, "transf_decoder"):
            return collate
        special = check_sequence_symbols(model.tokenizer)
        return partial(collate, pad_id=special["pad_id"], start_id=special["start_id"], end_id=special["end_id"])

    def describe(self, model: ModelPT) -> list[tuple[str, str]]:
        return [("tokenizer", f"{model.tokenizer.vocab_size} pieces, {model.cfg.tokenizer.dir}")]

    def stock_datasets(self) -> dict[str, dict[str, Any]]:
        """The data in NeMo's own keys: ``transcribe()`` reads some of them, NeMo's scripts begin from them."""
        nodes = {}
        for split in ("train_ds", "validation_ds"):
            files = [str(path) for path in manifests(self.cfg.data, split)]
            nodes[split] = {
                "manifest_filepath": files[0] if len(files) == 1 else files or None,
                "sample_rate": self.cfg.model.sample_rate,
                "batch_size": 8,
                "shuffle": split == "train_ds",
                "num_workers": 0,
                "pin_memory": True,
                "use_start_end_token": "transf_decoder" in self.cfg.model,  # as collate() does
            }
        return nodes


def limits_of(model: ModelPT) -> Limits:
    """What the model can learn from: CTC (itself, or beside a transducer) and attention decoders are limited."""
    uses_ctc = any(isinstance(getattr(model, name, None), CTCLoss) for name in ("loss", "ctc_loss"))
    positions = model.transf_decoder.max_sequence_length if hasattr(model, "transf_decoder") else None
    return Limits(
        ctc_frame=model.encoder.subsampling_factor if uses_ctc else None,
        max_tokens=None if positions is None else positions - 2,
    )
