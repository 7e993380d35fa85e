"""What `ablations.py` compares: the base run, its variants, the task that judges them. All that its results depend on
is here."""

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
        task, task_steps, task_keys: of speech_finetune.py: the config, and so on.
        judged_on: manifests under the corpus's folder. Nothing is chosen, so dev is as good as test.
        seeds: of pre-training, and of the fine-tuning after it.
    """

    config: str = "prompts_one_stage"
    steps: int = 800
    keys: tuple[str, ...] = ("checkpoint.keep_last=1",)
    task: str = "asr_ctc"
    task_steps: int = 200
    task_keys: tuple[str, ...] = (
        "model=tiny",
        "model.optim_param_groups.encoder.warmup_steps=50",
        "model.encoder.conformer.dropout=0.0",
        "checkpoint.keep_last=1",
    )
    judged_on: tuple[str, ...] = ("manifests/es_test.json", "manifests/es_dev.json")
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
            "speech_mask_0.129": Variant(
                "masked speech: spans start with 0.129, not 0.065",
                ("model.objectives.masked_speech.masking.start_probability=0.129",),
            ),
            "text_mask_0.3": Variant("masked text: 30%, not 15%", ("model.objectives.masked_text.masking.rate=0.3",)),
            "group_norm_padded": Variant(
                "NeMo's GroupNorm, padding counted, in batches padded over speech, text and pairs; in fine-tuning too",
                norm="group_norm",
            ),
            "batch_norm": Variant(
                "NeMo's BatchNorm, padding counted, in batches padded over speech, text and pairs; in fine-tuning too, "
                "where its running statistics go on",
                norm="batch_norm",
            ),
        }
    )

    def quick(self) -> Ablations:
        """Two steps a run."""
        return replace(self, steps=2, task_steps=2)


ABLATIONS = Ablations()
