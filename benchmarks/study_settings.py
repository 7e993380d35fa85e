"""What `study.py` compares: arms, tasks, steps, seeds. Everything that its results depend on is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

BASELINE = "scratch"
"""The arm without pre-training."""

_ARMS = ("speech", "stage1", "stage2", "one-stage")
_DROPOUT = ("model.encoder.conformer.dropout=0.1",)
_NO_DROPOUT = ("model.encoder.conformer.dropout=0.0",)
_LITTLE_MASKING = ("model.spec_augment.freq_width=15", "model.spec_augment.time_masks=2")  # the default of model=tiny
_MUCH_MASKING = ("model.spec_augment.freq_width=27", "model.spec_augment.time_masks=10")


@dataclass(frozen=True)
class Pretraining:
    """How an arm's encoder is made: a config of speech_pretrain.py, its steps and overrides, and the arm whose weights
    it starts from."""

    config: str
    steps: int
    keys: tuple[str, ...] = ()
    after: str | None = None


@dataclass(frozen=True)
class Task:
    """What an encoder is fine-tuned for.

    Attributes:
        config, steps, keys: of speech_finetune.py, the same for all arms.
        arms: beside the baseline.
        labels: ``all`` training rows, or ``few`` of the first language's.
        reference: the key of the rows to reach; test rows without it are left out.
        languages: of the test utterances.
        choices: name -> further keys. Every arm tries each with the first seed and keeps the best on the dev
            utterances, by the first metric: the same effort for all.
        baseline_choices: as many for the baseline, where those of the others need pre-trained weights.
    """

    title: str
    config: str
    steps: int
    arms: tuple[str, ...]
    labels: tuple[str, ...]
    reference: str
    metrics: tuple[str, ...]
    languages: tuple[str, ...]
    keys: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"usual": ()})
    baseline_choices: Mapping[str, tuple[str, ...]] | None = None

    def choices_of(self, arm: str) -> Mapping[str, tuple[str, ...]]:
        return self.choices if arm != BASELINE or self.baseline_choices is None else self.baseline_choices


@dataclass(frozen=True)
class Study:
    """Everything that the results depend on.

    Attributes:
        history: how the settings came about, for the page.
    """

    history: str = (
        "Not all settings were fixed beforehand: characters instead of word pieces, the objectives' weights, the arm "
        "`one-stage` and the choices `afresh` and `dropout` were taken up after trials on these utterances, so the "
        "best arm has been found with some hindsight; what an arm keeps is decided by dev utterances alone. Two runs "
        "at a time, and other work, shared two cores: minutes are an upper bound."
    )
    common: tuple[str, ...] = ("model=tiny",)
    seeds: tuple[int, ...] = (0, 1, 2)  # of fine-tuning; an arm is pre-trained once
    few: int = 40  # labelled utterances
    longest_test: float = 10.0  # seconds of a test utterance
    arms: Mapping[str, Pretraining] = field(
        default_factory=lambda: {
            "speech": Pretraining("slam_stage1", 1200, ("model.objectives.masked_text=null",)),
            "stage1": Pretraining("slam_stage1", 1200),
            "stage2": Pretraining("prompts_stage2", 800, after="stage1"),
            "one-stage": Pretraining("prompts_stage2", 800, ("model.quantizer.steps_before=0",)),
        }
    )
    tasks: Mapping[str, Task] = field(
        default_factory=lambda: {
            "asr": Task(
                *("Spanish recognition (CTC)", "asr_ctc", 600, _ARMS, ("all",)),
                *("text", ("cer", "wer"), ("es",)),
                choices={"usual": _NO_DROPOUT, "afresh": (*_NO_DROPOUT, "reinit_last_layers=2"), "dropout": _DROPOUT},
                baseline_choices={"usual": _NO_DROPOUT, "masked": (*_NO_DROPOUT, *_MUCH_MASKING), "dropout": _DROPOUT},
            ),
            "short": Task(
                *("Spanish recognition (CTC) in a third of the steps", "asr_ctc", 200),
                *(("stage2", "one-stage"), ("all",)),
                *("text", ("cer", "wer"), ("es",)),
                keys=("model.optim_param_groups.encoder.warmup_steps=50", *_NO_DROPOUT),
            ),
            "few": Task(
                *("Spanish recognition (CTC)", "asr_ctc", 300, _ARMS, ("few",)),
                *("text", ("cer", "wer"), ("es",)),
                keys=_MUCH_MASKING,
                choices={
                    "trained": _NO_DROPOUT,
                    "frozen": (*_NO_DROPOUT, "freeze_encoder_steps=300"),
                    "dropout": _DROPOUT,
                },
                baseline_choices={
                    "trained": _NO_DROPOUT,
                    "light": (*_NO_DROPOUT, *_LITTLE_MASKING),
                    "dropout": _DROPOUT,
                },
            ),
            "st": Task(
                *("Spanish and French speech to English text", "st", 600, ("stage2", "one-stage"), ("all",)),
                *("translation", ("bleu", "chrf"), ("es", "fr")),
                keys=_NO_DROPOUT,
            ),
        }
    )

    def quick(self) -> Study:
        """Two steps a run."""
        arms = {name: replace(arm, steps=2) for name, arm in self.arms.items()}
        return replace(self, arms=arms, tasks={name: replace(task, steps=2) for name, task in self.tasks.items()})


STUDY = Study()
