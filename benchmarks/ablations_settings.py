"""What `ablations.py` compares: the base run, its variants, the task that judges them. All that its results depend on
is here; the labelled and test utterances are those of the study's task "few"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

BASE = "base"
UNTRAINED = "untrained"
"""The arm without pre-training: a random encoder, which says what the task can tell."""


@dataclass(frozen=True)
class Variant:
    """What differs from the base run.

    Attributes:
        title: in words.
        keys: overrides of speech_pretrain.py.
        norm: of with_norm.py, or None for ours.
    """

    title: str
    keys: tuple[str, ...] = ()
    norm: str | None = None


@dataclass(frozen=True)
class Ablations:
    """Everything that the results depend on.

    Attributes:
        config, steps, keys: of speech_pretrain.py, the same for all variants.
        probe_config, probe_steps, probe_keys: of speech_finetune.py.
        seeds: of pre-training, and of the fine-tuning after it.
    """

    config: str = "prompts_one_stage"
    steps: int = 400
    keys: tuple[str, ...] = (
        "model=tiny",
        "data.train_ds.speech.frames_per_step=1000",
        "data.train_ds.text.tokens_per_step=300",
        "data.train_ds.pairs.frames_per_step=1000",
        "checkpoint.keep_last=1",
    )
    probe_config: str = "asr_ctc"
    probe_steps: int = 300
    probe_keys: tuple[str, ...] = ("model=tiny", "checkpoint.keep_last=1", "model.encoder.conformer.dropout=0.0")
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: Mapping[str, Variant] = field(
        default_factory=lambda: {
            BASE: Variant("all objectives, Gumbel quantizer, GroupNorm over each sequence's own rows"),
            "no_contrastive": Variant("no contrastive loss", ("model.speech_loss.contrastive_weight=0",)),
            "random_projection": Variant(
                "frozen random projection to 64 codes; without contrastive and diversity loss, which it has no use for",
                (
                    *("model.quantizer=null", "model.random_projection={num_codes: 64, code_dim: 16}"),
                    *("model.speech_loss.contrastive_weight=0", "model.speech_loss.diversity_weight=0"),
                ),
            ),
            "no_translation_lm": Variant(
                "no translation language modelling (TLM)", ("model.objectives.translation_lm=null",)
            ),
            "no_matching": Variant("no speech-text matching (STM)", ("model.objectives.matching=null",)),
            "no_ctc": Variant("no CTC", ("model.objectives.ctc=null",)),
            "speech_mask_0.03": Variant(
                "masked speech: spans start with 0.03, not 0.065",
                ("model.objectives.masked_speech.masking.start_probability=0.03",),
            ),
            "speech_mask_0.129": Variant(
                "masked speech: spans start with 0.129, not 0.065",
                ("model.objectives.masked_speech.masking.start_probability=0.129",),
            ),
            "text_mask_0.3": Variant("masked text: 30%, not 15%", ("model.objectives.masked_text.masking.rate=0.3",)),
            "group_norm_padded": Variant("GroupNorm as NeMo has it, padding counted", norm="group_norm"),
            "batch_norm": Variant(
                "BatchNorm as NeMo has it, padding counted; its running statistics go on after pre-training",
                norm="batch_norm",
            ),
        }
    )

    def quick(self) -> Ablations:
        """Two steps a run."""
        return replace(self, steps=2, probe_steps=2)


ABLATIONS = Ablations()
