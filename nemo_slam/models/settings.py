"""The model's part of the config, as dataclasses: every key is read here or refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_slam.config import parse, unknown_key
from nemo_slam.models.augmentation import AugmentationConfig
from nemo_slam.models.masking import CorruptionConfig, MaskVectorConfig
from nemo_slam.modules.conformer import ConformerConfig
from nemo_slam.modules.multimodal_encoder import MultimodalEncoderConfig
from nemo_slam.modules.quantizer import GumbelQuantizerConfig
from nemo_slam.modules.random_projection import RandomProjectionConfig
from nemo_slam.modules.speech_encoder import SpeechEncoderConfig
from nemo_slam.modules.text_encoder import TextEncoderConfig
from nemo_slam.objectives.ctc import INPUTS as CTC_INPUTS
from nemo_slam.objectives.ctc import UNITS
from nemo_slam.objectives.inputs import SpeechMasking, TokenMasking
from nemo_slam.objectives.masked_speech import SpeechLossConfig
from nemo_slam.objectives.matching import INPUTS, NEGATIVES


@dataclass(frozen=True)
class MaskedSpeechConfig:
    """Spans of 10 subsampled frames (400 ms), start probability 0.065 (w2v-BERT, section 3.3)."""

    masking: SpeechMasking = SpeechMasking(0.065)
    weight: float = 1.0


@dataclass(frozen=True)
class MaskedTextConfig:
    """15% of the tokens in spans of 5 (SLAM, section 3.2)."""

    masking: TokenMasking = TokenMasking(0.15)
    weight: float = 1.0


@dataclass(frozen=True)
class TranslationLMConfig:
    """75% of the frames (start probability 0.129 gives that on long input) and 50% of the tokens (SLAM, section
    3.2).

    Attributes:
        contrastive_weight: of the contrastive loss on the paired speech, times ``speech_loss.contrastive_weight``.
    """

    speech_masking: SpeechMasking = SpeechMasking(0.129)
    token_masking: TokenMasking = TokenMasking(0.5)
    weight: float = 1.0
    contrastive_weight: float = 1.0


@dataclass(frozen=True)
class MatchingConfig:
    """Attributes:
    input: ``unmasked`` (ALBEF) or ``masked``, as translation language modelling masks.
    negatives: ``stream`` (the pair stream's, of fitting length) or ``in_batch``: the text of another pair of the
        micro-batch, of any rank's, drawn by similarity (ALBEF); where there is none with another text, the stream's.
    """

    input: str = "unmasked"
    negatives: str = "stream"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise ValueError(f"input: {self.input!r} is not one of {', '.join(INPUTS)}")
        if self.negatives not in NEGATIVES:
            raise ValueError(f"negatives: {self.negatives!r} is not one of {', '.join(NEGATIVES)}")


@dataclass(frozen=True)
class CTCConfig:
    """CTC on the pairs' speech (mSLAM).

    Attributes:
        input: ``translation_lm`` (the speech of that objective's pairs, masked beside its masked text) or ``speech``
            (the paired speech alone).
        speech_masking: of ``speech``; null hears everything.
        units: ``pieces`` of the text's vocabulary, or their ``characters``.
    """

    weight: float = 1.0
    input: str = "translation_lm"
    units: str = "pieces"
    speech_masking: SpeechMasking | None = None

    def __post_init__(self) -> None:
        if self.input not in CTC_INPUTS:
            raise ValueError(f"input: {self.input!r} is not one of {', '.join(CTC_INPUTS)}")
        if self.units not in UNITS:
            raise ValueError(f"units: {self.units!r} is not one of {', '.join(UNITS)}")
        if self.speech_masking is not None and self.input != "speech":
            raise ValueError("speech_masking is of input=speech alone: translation_lm has its own")


@dataclass(frozen=True)
class ObjectivesConfig:
    """The objectives of a stage; null leaves one out."""

    masked_speech: MaskedSpeechConfig | None = None
    masked_text: MaskedTextConfig | None = None
    translation_lm: TranslationLMConfig | None = None
    matching: MatchingConfig | None = None
    ctc: CTCConfig | None = None

    def __post_init__(self) -> None:
        if self.translation_lm is None and self.ctc is not None and self.ctc.input == "translation_lm":
            raise ValueError("ctc reads the speech of translation_lm's pairs: enable that too, or set ctc.input=speech")
        if self.translation_lm is None and self.matching is not None and self.matching.input == "masked":
            raise ValueError("matching.input=masked takes its masking from translation_lm: enable that too")


@dataclass(frozen=True)
class EncoderSettings:
    """What the exported encoder needs as well as pre-training."""

    conformer: ConformerConfig = field(default_factory=ConformerConfig)
    speech_encoder: SpeechEncoderConfig = field(default_factory=SpeechEncoderConfig)
    multimodal_encoder: MultimodalEncoderConfig = field(default_factory=MultimodalEncoderConfig)
    pad_multiple: int = 16


@dataclass(frozen=True)
class ModelSettings(EncoderSettings):
    """Everything of the ``model`` node that shapes the network and its losses.

    Attributes:
        pad_multiple: packed rows are rounded up to a multiple of this, but on a CPU.
        quantizer: the trained one of w2v-BERT, or null.
        random_projection: the frozen one of BEST-RQ in its place, or null.
        augmentation: noise on masked speech's input, or null.
        max_positions: upper limit of packed rows in one micro-batch of the multimodal encoder, or null.
    """

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    quantizer: GumbelQuantizerConfig | None = field(default_factory=GumbelQuantizerConfig)
    random_projection: RandomProjectionConfig | None = None
    mask_vector: MaskVectorConfig = field(default_factory=MaskVectorConfig)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    augmentation: AugmentationConfig | None = None
    speech_loss: SpeechLossConfig = field(default_factory=SpeechLossConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    max_positions: int | None = None

    def __post_init__(self) -> None:
        if not any(vars(self.objectives).values()):
            raise ValueError("objectives: none is enabled; a stage needs at least one")
        if (self.quantizer is None) == (self.random_projection is None):
            raise ValueError("exactly one of quantizer and random_projection must be given, the other be null")
        if self.augmentation is not None and self.objectives.masked_speech is None:
            raise ValueError("augmentation is of masked_speech's input, which objectives leaves out: set it to null")
        trained = self.speech_loss.contrastive_weight != 0 or self.speech_loss.diversity_weight != 0
        if self.random_projection is not None and trained:
            raise ValueError(
                "random_projection has no trained targets: it wants speech_loss.contrastive_weight and "
                f"speech_loss.diversity_weight 0, got {self.speech_loss.contrastive_weight} and "
                f"{self.speech_loss.diversity_weight}"
            )


OTHER_KEYS = frozenset(
    {
        "preprocessor",
        "tokenizer",
        "train_ds",
        "validation_ds",
        "test_ds",
        "optim",
        "seed",
        "target",
        "nemo_version",
        "model_target",
    }
)
"""Keys of the ``model`` node that NeMo or the model itself reads."""


def model_settings(cfg: Any) -> ModelSettings:
    """Parse the ``model`` node.

    Raises:
        ValueError: a key that nothing reads, or a value out of range.
    """
    own = {f for f in ModelSettings.__dataclass_fields__}
    for key in cfg:
        if key not in own and key not in OTHER_KEYS:
            raise unknown_key(str(key), own | OTHER_KEYS, "model")
    return parse(ModelSettings, {key: cfg[key] for key in cfg if key in own}, "model")
