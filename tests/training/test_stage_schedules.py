"""The paper's configs: how the learning rate goes, what a step holds, how long a stage is."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(stage, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(f"slam_{stage}", ["data=paper", *overrides])
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("size", ["tiny", "base", "slam"])
def test_the_gumbel_temperature_goes_on_from_stage_to_stage(size):
    """wav2vec 2.0, section 4.2: start * decay^step, not below the end."""
    begins, ends = [], []
    for stage in ("stage1", "stage2", "stage3"):
        cfg = composed(stage, f"model={size}")
        node, steps = cfg["model"]["quantizer"], cfg["trainer"]["max_steps"]
        for places, step in ((begins, 0), (ends, steps)):
            decayed = node["temperature_start"] * node["temperature_decay"] ** (node.get("steps_before", 0) + step)
            places.append(max(node["temperature_end"], decayed))
    assert begins[0] == 2.0
    assert begins[1:] == pytest.approx(ends[:-1], rel=1e-9)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3", "one_stage"])
def test_the_learning_rate_is_the_transformers_with_a_peak_of_6e_4(stage):
    from nemo.core.optim.lr_scheduler import prepare_lr_scheduler

    cfg = composed(stage)
    optim, last = cfg["model"]["optim"], cfg["trainer"]["max_steps"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=optim["lr"], betas=optim["betas"])
    schedule = prepare_lr_scheduler(optimizer, OmegaConf.create({**optim["sched"], "max_steps": last}))["scheduler"]
    peak, warmup = 6e-4, 40_000
    for step in (1, 100, 20_000, 40_000, 80_000, 160_000, last):
        schedule.last_epoch = step - 1
        (rate,) = schedule.get_lr()
        # Vaswani et al., section 5.3: min(step^-1/2, step * warmup^-3/2), here times what makes the peak.
        expected = peak * warmup**0.5 * min(step**-0.5, step * warmup**-1.5)
        assert rate == pytest.approx(expected, rel=1e-4), step


def test_a_step_is_2048_utterances_8192_sentences_and_256_pairs():
    """Of 14 s, 25 tokens and 12 s."""
    streams = composed("stage2")["model"]["train_ds"]
    assert streams["speech"]["frames_per_step"] == 2048 * 1400
    assert streams["text"]["tokens_per_step"] == 8192 * 25
    assert streams["pairs"]["frames_per_step"] == 256 * 1200


@pytest.mark.parametrize(
    ("stage", "steps", "before", "weights"),
    [
        ("stage1", 500_000, 0, {"masked_speech": 1.0, "masked_text": 0.3}),
        (
            "stage2",
            250_000,
            500_000,
            {"masked_speech": 1.0, "masked_text": 0.3, "translation_lm": 0.03, "matching": 0.03},
        ),
        ("stage3", 250_000, 750_000, {"masked_speech": 1.0}),
        (
            "one_stage",
            500_000,
            0,
            {"masked_speech": 1.0, "masked_text": 0.3, "translation_lm": 0.03, "matching": 0.03},
        ),
    ],
)
def test_stages(stage, steps, before, weights):
    cfg = composed(stage)
    assert cfg["trainer"]["max_steps"] == steps
    assert cfg["model"]["quantizer"].get("steps_before", 0) == before
    objectives = {name: node["weight"] for name, node in cfg["model"]["objectives"].items() if node is not None}
    assert objectives == weights
