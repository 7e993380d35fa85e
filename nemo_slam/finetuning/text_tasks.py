"""Fine-tuning with text in: machine translation and classification."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf

from nemo_slam.config import ConfigError
from nemo_slam.data.bad_rows import BadRows, EmptyStreamError
from nemo_slam.data.corpora.files import whole_file
from nemo_slam.data.manifest import RowError
from nemo_slam.data.token_file import Tokenizer
from nemo_slam.finetuning.loader import Collate
from nemo_slam.finetuning.pretrained import TEXT_ENCODER, encoder_node
from nemo_slam.finetuning.sentences import SentenceStream, read_values
from nemo_slam.finetuning.task import Task, check_sequence_symbols, check_tokenizer, manifests, plain, train_once


class TextTask(Task):
    """What translation and classification share: the encoder and the tokenizer of its text."""

    volume = ("tokens_per_second", 1.0)
    most_texts: int

    def text_keys(self) -> list[str]:
        """The rows' keys of one text, or two, the same number in training and validation.

        Raises:
            ConfigError: a second text where the model takes one, or in one of the two data sections alone.
        """
        data = self.cfg.data
        nodes = {split: data[split] for split in ("train_ds", "validation_ds") if data.get(split) is not None}
        keys = {split: [node.text_key, node.get("second_key")] for split, node in nodes.items()}
        found = {split: [key for key in own if key is not None] for split, own in keys.items()}
        for split, own in found.items():
            if len(own) > self.most_texts:
                raise ConfigError(
                    f"data.{split}.second_key={own[1]}: {self.cfg.model.target.rpartition('.')[2]} reads one text; "
                    "leave this key out, or join the texts under one key"
                )
            if len(own) != len(found["train_ds"]):
                raise ConfigError(
                    f"data.{split} has {len(own)} text(s) a row ({', '.join(own)}), data.train_ds "
                    f"{len(found['train_ds'])} ({', '.join(found['train_ds'])}): set second_key in both or in none"
                )
        return found["train_ds"]

    def source_tokenizer(self) -> Path:
        """The pre-trained encoder's own tokenizer; without one ``model.source_tokenizer.model_path``, or a tokenizer
        trained on the training rows.

        Raises:
            ValueError: a pre-trained encoder, and another tokenizer than its own.
        """
        cfg, folder = self.cfg, self.run_folder / "source_tokenizer"
        named = cfg.model.source_tokenizer.model_path
        if self.pretrained is not None:
            if named is not None:
                raise ValueError(
                    f"model.source_tokenizer.model_path: the encoder of {self.pretrained.path} brings its own; "
                    "leave this null"
                )
            assert self.pretrained.tokenizer is not None
            with whole_file(folder / "tokenizer.model") as file:
                file.write_bytes(self.pretrained.tokenizer)
            return folder / "tokenizer.model"
        if named is not None:
            return check_tokenizer(Path(named).parent, "model.source_tokenizer.model_path") / Path(named).name
        train_once(folder, cfg.data, "text_key", read_values, cfg.source_tokenizer.vocab_size)
        return folder / "tokenizer.model"

    def base_node(self) -> dict[str, Any]:
        """The model's config but for what only a subclass knows. Keys of speech are null and left out."""
        keys, node = self.text_keys(), plain(self.cfg.model)
        node = {key: value for key, value in node.items() if value is not None}
        encoder = {key: value for key, value in node["encoder"].items() if value is not None}
        tokenizer = self.source_tokenizer()
        if self.pretrained is None:
            encoder["text_encoder"]["vocab_size"] = Tokenizer(tokenizer).vocab_size
        else:
            dropout = encoder["text_encoder"]["dropout"]
            self.pretrained.architecture["text_encoder"]["dropout"] = dropout
        node["encoder"] = encoder_node(encoder, self.pretrained, TEXT_ENCODER)
        node["source_tokenizer"] = {"model_path": str(tokenizer)}
        node["text_keys"] = keys  # what inference reads
        return node

    @abstractmethod
    def targets(self, model: ModelPT) -> dict[str, Any]:
        """What `SentenceStream` asks about targets: how one becomes tokens, by which tokenizer, and how many fit."""

    def stream(self, model: ModelPT, split: str, bad_rows: BadRows) -> SentenceStream | None:
        node = self.cfg.data.get(f"{split}_ds")
        if node is None:
            return None
        return SentenceStream(
            plain(node),
            model.source_tokenizer.path,
            **self.targets(model),
            seed=self.cfg.seed,
            bad_rows=bad_rows,
            name=split,
        )

    def collate(self, model: ModelPT) -> Collate:
        return model.collate

    def describe(self, model: ModelPT) -> list[tuple[str, str]]:
        return [("source tokenizer", f"{model.source_tokenizer.vocab_size} pieces, {model.source_tokenizer.path}")]


class TranslationTask(TextTask):
    """Text to text."""

    most_texts = 1

    def model_node(self) -> DictConfig:
        cfg, node = self.cfg, self.base_node()
        if cfg.model.tokenizer.dir is not None:
            folder = check_tokenizer(cfg.model.tokenizer.dir, "model.tokenizer.dir")
        else:
            folder = self.run_folder / "tokenizer"
            options = {"model_type": cfg.tokenizer.model_type, "sequence_symbols": cfg.tokenizer.sequence_symbols}
            train_once(folder, cfg.data, "target_key", read_values, cfg.tokenizer.vocab_size, **options)
        node["tokenizer"] = {"model_path": str(folder / "tokenizer.model")}
        return OmegaConf.create(node)

    def targets(self, model: ModelPT) -> dict[str, Any]:
        check_sequence_symbols(model.tokenizer)
        tokenizer = Tokenizer(model.cfg.tokenizer.model_path)
        return {
            "encode_targets": tokenizer.encode,
            "target_digest": tokenizer.digest,
            "target_tokenizer": tokenizer,
            "max_target": model.transf_decoder.max_sequence_length - 2,
        }

    def describe(self, model: ModelPT) -> list[tuple[str, str]]:
        target = f"{model.tokenizer.vocab_size} pieces, {model.cfg.tokenizer.model_path}"
        return [*super().describe(model), ("target tokenizer", target)]


class ClassificationTask(TextTask):
    """Text to a label."""

    most_texts = 2

    def model_node(self) -> DictConfig:
        cfg, node = self.cfg, self.base_node()
        train = cfg.data.train_ds
        if cfg.model.labels is None:
            node["labels"] = sorted(set(read_values(manifests(cfg.data, "train_ds"), train.target_key)))
            if not node["labels"]:
                names = ", ".join(map(str, manifests(cfg.data, "train_ds")))
                raise EmptyStreamError(
                    f"data.train_ds: no row of {names} has a label {train.target_key!r} (data.train_ds.target_key)"
                )
        node["encoder"] |= {"cls": cfg.model.pool == "cls", "texts": len(node["text_keys"])}
        return OmegaConf.create(node)

    def targets(self, model: ModelPT) -> dict[str, Any]:
        classes = {label: number for number, label in enumerate(model.labels)}

        def encode(labels: list[str]) -> list[list[int]]:
            for label in labels:
                if label not in classes:
                    raise RowError(f"the label {label!r} is not one of {', '.join(classes)}")
            return [[classes[label]] for label in labels]

        return {"encode_targets": encode, "target_digest": ",".join(model.labels)}

    def describe(self, model: ModelPT) -> list[tuple[str, str]]:
        shown = ", ".join(model.labels[:8]) + (", ..." if len(model.labels) > 8 else "")
        return [*super().describe(model), ("labels", f"{len(model.labels)}: {shown}")]
