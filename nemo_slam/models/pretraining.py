"""The pre-training model: orchestration of encoders, objectives and streams as a NeMo ``ModelPT``."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from nemo_slam.data.audio import SAMPLE_RATE, check_sample_rate
from nemo_slam.data.batch import StepBatch
from nemo_slam.models.augmentation import add_noise
from nemo_slam.models.settings import ModelSettings, model_settings
from nemo_slam.models.step import Encoders, StepOutputs, StepSettings, run_step
from nemo_slam.modules.multimodal_encoder import MultimodalEncoder
from nemo_slam.modules.quantizer import GumbelQuantizer
from nemo_slam.modules.random_projection import RandomProjectionQuantizer
from nemo_slam.modules.speech_encoder import SUBSAMPLING_FACTOR, SpeechEncoder
from nemo_slam.modules.text_encoder import TextEncoder
from nemo_slam.objectives.base import Objective, ObjectiveOutput, sum_over_ranks, world_size
from nemo_slam.objectives.ctc import PairCTC
from nemo_slam.objectives.masked_speech import MaskedSpeech, SpeechLoss
from nemo_slam.objectives.masked_text import MaskedText, TextLoss
from nemo_slam.objectives.matching import Matching
from nemo_slam.objectives.metrics import MetricAccumulator
from nemo_slam.objectives.spelling import spell
from nemo_slam.objectives.translation_lm import TranslationLM
from nemo_slam.packing import row_multiple
from nemo_slam.randomness import Randomness
from slam_kernels import backend as kernel_backend


def build_speech_loss(settings: ModelSettings) -> SpeechLoss | None:
    """The losses on masked speech with their quantizer, if an objective masks speech."""
    chosen, width = settings.objectives, settings.conformer.d_model
    if chosen.masked_speech is None and chosen.translation_lm is None:
        return None
    quantizer: GumbelQuantizer | RandomProjectionQuantizer
    if settings.random_projection is not None:
        features = SUBSAMPLING_FACTOR * settings.speech_encoder.feat_in
        quantizer = RandomProjectionQuantizer(settings.random_projection, features)
    else:
        assert settings.quantizer is not None
        quantizer = GumbelQuantizer(settings.quantizer, width)
    return SpeechLoss(settings.speech_loss, quantizer, width)


def build_objectives(
    settings: ModelSettings,
    speech_loss: SpeechLoss | None,
    text_loss: TextLoss | None,
    tokenizer: sentencepiece.SentencePieceProcessor,
) -> nn.ModuleDict:
    """The objectives that the config enables, by name; the two losses that several share stay the model's."""
    chosen, width = settings.objectives, settings.conformer.d_model
    objectives: list[Objective] = []
    if chosen.masked_speech is not None:
        assert speech_loss is not None
        objectives.append(MaskedSpeech(chosen.masked_speech.masking, chosen.masked_speech.weight, speech_loss))
    if chosen.masked_text is not None:
        assert text_loss is not None
        objectives.append(MaskedText(chosen.masked_text.masking, chosen.masked_text.weight, text_loss))
    if chosen.translation_lm is not None:
        assert speech_loss is not None
        assert text_loss is not None
        tlm = chosen.translation_lm
        masking = (tlm.speech_masking, tlm.token_masking)
        objectives.append(TranslationLM(*masking, tlm.weight, tlm.contrastive_weight, speech_loss, text_loss))
    if chosen.matching is not None:
        tlm_masking = chosen.translation_lm
        masked = chosen.matching.input == "masked"
        objectives.append(
            Matching(
                chosen.matching.weight,
                width,
                tlm_masking.speech_masking if masked and tlm_masking else None,
                tlm_masking.token_masking if masked and tlm_masking else None,
                chosen.matching.negatives,
            )
        )
    if chosen.ctc is not None:
        ctc, vocab_size = chosen.ctc, settings.text_encoder.vocab_size
        spelling = None if ctc.units == "pieces" else spell(tokenizer)
        objectives.append(PairCTC(ctc.weight, width, vocab_size, spelling, ctc.input, ctc.speech_masking))
    return nn.ModuleDict({objective.name: objective for objective in objectives})


class SLAMPretrainingModel(ModelPT, Encoders):
    """SLAM pre-training (arXiv 2110.10329): all objectives of a stage in one forward and one backward.

    Args:
        cfg: the ``model`` node; ``nemo_slam.models.settings`` lists its keys.
        trainer: Lightning's trainer.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None):
        settings = model_settings(cfg)
        super().__init__(cfg=cfg, trainer=trainer)
        self.settings = settings
        self.preprocessor = self.from_config_dict(self._cfg.preprocessor)
        self._check_preprocessor()
        self._tokenizer = Path(str(self.register_artifact("tokenizer.model_path", cfg.tokenizer.model_path)))
        self._tokenizer_bytes = self._tokenizer.read_bytes()
        width = settings.conformer.d_model
        self.speech_encoder = SpeechEncoder(settings.speech_encoder, settings.conformer)
        self.text_encoder = TextEncoder(settings.text_encoder, width)
        self.multimodal_encoder = MultimodalEncoder(settings.multimodal_encoder, settings.conformer)
        chosen = settings.objectives
        predicts_text = chosen.masked_text is not None or chosen.translation_lm is not None
        self.speech_loss = build_speech_loss(settings)
        self.text_loss = TextLoss(settings.text_encoder.vocab_size) if predicts_text else None
        self.objectives = build_objectives(
            settings,
            self.speech_loss,
            self.text_loss,
            sentencepiece.SentencePieceProcessor(model_proto=self._tokenizer_bytes),
        )
        # Without masked speech the vector would be a parameter that no loss reaches.
        masks_speech = any(i.masking is not None for objective in self.objectives.values() for i in objective.speech)
        learned = settings.mask_vector.kind == "learned" and masks_speech
        self.mask_vector = nn.Parameter(torch.randn(width) * settings.mask_vector.std) if learned else None
        self.randomness = Randomness(int(cfg.get("seed", 0)))
        self.train_metrics = MetricAccumulator()
        self.validation_metrics = MetricAccumulator()
        self.check_tokenizer()

    @classmethod
    def list_available_models(cls) -> list[Any]:
        return []

    @property
    def tokenizer_model(self) -> Path:
        """The SentencePiece file. NeMo deletes what it unpacks once it has restored: then a copy, kept for as long as
        this model."""
        if not self._tokenizer.is_file():
            folder = tempfile.mkdtemp(prefix="nemo_slam_")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._tokenizer = Path(folder) / "tokenizer.model"
            self._tokenizer.write_bytes(self._tokenizer_bytes)
        return self._tokenizer

    @property
    def streams(self) -> tuple[str, ...]:
        """The data streams that the stage's objectives need."""
        return tuple(dict.fromkeys(stream for objective in self.objectives.values() for stream in objective.streams))

    @property
    def kernels(self) -> str:
        """``torch`` or ``triton``: what the config's choice means on the model's device."""
        return kernel_backend.resolve(self.settings.conformer.kernels, self.device)

    def _check_preprocessor(self) -> None:
        """Features must be of the audio that there is, and randomness a function of (seed, step, example): NeMo's
        dither is not."""
        if float(self._cfg.preprocessor.get("dither", 0.0)) != 0.0:
            raise ValueError(
                "model.preprocessor.dither must be 0.0: it draws from a generator's state, so a resume would differ"
            )
        check_sample_rate(self._cfg.preprocessor.get("sample_rate", SAMPLE_RATE), "model.preprocessor.sample_rate")
        if self.settings.random_projection is not None and not self._cfg.preprocessor.get("normalize"):
            raise ValueError(
                "model.preprocessor.normalize must be per_feature or all_features with model.random_projection: "
                "projections of "
                "features that are not normalised fall on a handful of codes"
            )
        if self._cfg.preprocessor.features != self.settings.speech_encoder.feat_in:
            raise ValueError(
                f"model.preprocessor.features is {self._cfg.preprocessor.features}, model.speech_encoder.feat_in is "
                f"{self.settings.speech_encoder.feat_in}: they must agree"
            )

    def check_tokenizer(self) -> None:
        """The embedding must hold every piece of the tokenizer; random replacements are drawn from its pieces alone."""
        pieces = sentencepiece.SentencePieceProcessor(model_proto=self._tokenizer_bytes).get_piece_size()
        if pieces > self.settings.text_encoder.vocab_size:
            raise ValueError(
                f"the tokenizer {self.tokenizer_model} has {pieces} pieces, model.text_encoder.vocab_size is "
                f"{self.settings.text_encoder.vocab_size}: raise the latter or train a smaller tokenizer"
            )
        self.text_encoder.num_pieces = pieces

    def set_unigrams(self, counts: Mapping[str, Tensor]) -> None:
        """Token counts (V,) of the training text by stream, for the guess that masked tokens are compared with."""
        for name, objective in self.objectives.items():
            if isinstance(objective, (MaskedText, TranslationLM)):
                assert self.text_loss is not None
                self.text_loss.set_unigram(name, counts[objective.streams[0]])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of another architecture is refused before anything is loaded: a resume takes all or nothing.

        Raises:
            ValueError: names or shapes differ.
        """
        super().on_load_checkpoint(checkpoint)
        if "state_dict" not in checkpoint:  # in shards: the strategy loads them, and checks names and shapes itself
            return
        own, saved = self.state_dict(), checkpoint["state_dict"]
        wrong = [f"{name} is not in it" for name in own if name not in saved]
        wrong += [f"{name} is only in it" for name in saved if name not in own]
        wrong += [
            f"{name} is {tuple(saved[name].shape)} in it and {tuple(own[name].shape)} in this model"
            for name in own
            if name in saved and saved[name].shape != own[name].shape
        ]
        if wrong:
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"the checkpoint to resume from is of another architecture: {'; '.join(wrong[:3])}{more}. Put the "
                "model's settings back, or give the run another name (name=...) and start it from those weights with "
                "init_from"
            )

    # ---- data
    # -------------------------------------------------------------------------------------------------------------

    def setup_training_data(self, train_data_config: DictConfig | dict | None) -> None:
        """Keep the streams' config; the loader is built when training starts and the step to start from is known."""
        self._update_dataset_config("train", train_data_config)

    def setup_validation_data(self, val_data_config: DictConfig | dict | None) -> None:
        self._update_dataset_config("validation", val_data_config)

    def setup_multiple_validation_data(self, val_data_config: DictConfig | dict | None) -> None:
        self.setup_validation_data(val_data_config)

    # ---- forward
    # ----------------------------------------------------------------------------------------------------------

    def features(self, batch: StepBatch) -> tuple[Tensor, np.ndarray]:
        """Log-mel (B, F, T) of the speech stream's utterances, then the pairs', and their frames (B,), known without
        a sync."""
        parts = [part for part in (batch.speech, batch.pairs) if part is not None]
        lengths = torch.cat([part.audio_lengths for part in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        if len(lengths) == 0:
            return torch.zeros(
                0, self.settings.speech_encoder.feat_in, 0, device=self.device, dtype=self.dtype
            ), np.zeros(0, np.int64)
        width = max(part.audio.shape[1] for part in parts)
        audio = torch.cat([nn.functional.pad(part.audio, (0, width - part.audio.shape[1])) for part in parts])
        with torch.no_grad():
            mel, _ = self.preprocessor(input_signal=audio, length=lengths.to(audio.device))
        frames = self.preprocessor.featurizer.get_seq_len(lengths).numpy()
        return mel.to(self.dtype), frames

    def forward(self, batch: StepBatch) -> StepOutputs:
        """Everything that the objectives read, for one micro-batch."""
        features, frames = self.features(batch)
        noisy, augmentation = None, self.settings.augmentation
        if augmentation is not None and self.training and batch.speech is not None:
            speech = add_noise(batch.speech, augmentation, self.randomness, self.kernels)
            noisy, _ = self.features(StepBatch(batch.step, speech=speech))
        return run_step(
            self,
            features,
            frames,
            batch,
            list(self.objectives.values()),
            self.randomness,
            StepSettings(
                self.kernels,
                row_multiple(self.settings.pad_multiple, features.device),
                self.settings.max_positions,
                self.settings.corruption,
            ),
            self.settings.mask_vector.std if self.mask_vector is None else self.mask_vector,
            self._trainer.global_step if self._trainer is not None else 0,
            noisy,
        )

    def losses(self, batch: StepBatch) -> tuple[Tensor, ObjectiveOutput, StepOutputs]:
        """The loss to minimise and its parts. Gradients averaged over ranks are those of the global batch's loss."""
        outputs = self(batch)
        result = ObjectiveOutput()
        for objective in self.objectives.values():
            result.extend(objective(outputs))
        # A loss without examples anywhere is 0 / 1, still connected to its parameters.
        counts = sum_over_ranks(torch.stack([loss.count for loss in result.losses])).clamp(min=1)
        total = sum(loss.weight * loss.total * world_size() / n for loss, n in zip(result.losses, counts, strict=True))
        return total, result, outputs

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        total, result, outputs = self.losses(batch)
        self.train_metrics.update(result, outputs.volume(batch))
        return total

    def validation_step(self, batch: StepBatch, batch_idx: int) -> StepOutputs:
        _, result, outputs = self.losses(batch)
        self.validation_metrics.update(result, outputs.volume(batch))
        return outputs  # for the probes

    def on_validation_epoch_end(self) -> None:
        figures = self.validation_metrics.flush()
        self.last_validation = {f"val_{name}": value for name, value in figures.items()}
        if "loss" in figures:
            self.log("val_loss", figures["loss"], sync_dist=False)

    # ---- export
    # -----------------------------------------------------------------------------------------------------------

    def encoder_config(self) -> DictConfig:
        """The config of a :class:`~nemo_slam.models.encoder.SLAMEncoder` with this model's encoder."""
        keys = ("conformer", "speech_encoder", "multimodal_encoder", "pad_multiple")
        node = OmegaConf.create(
            {key: OmegaConf.to_container(self._cfg[key], resolve=True) for key in keys if key in self._cfg}
        )
        with open_dict(node):
            node._target_ = "nemo_slam.models.encoder.SLAMEncoder"
        return node
