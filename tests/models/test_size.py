"""The paper's model has the paper's size, counted without allocating it."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture
def on_meta(tokenizer_model):
    """A function (config, overrides) -> the model on the meta device."""

    def build(config, *overrides):
        from nemo_slam.models.pretraining import SLAMPretrainingModel

        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(config, [*overrides, f"data.tokenizer.model_path={tokenizer_model}"])
        cfg = OmegaConf.create(OmegaConf.to_container(cfg.model, resolve=True))
        with torch.device("meta"):
            return SLAMPretrainingModel(cfg)

    return build


def size(module, without=()):
    return sum(p.numel() for name, p in module.named_parameters() if name not in without)


@pytest.mark.parametrize("config", ["slam_stage1", "slam_stage2", "slam_stage3", "slam_one_stage"])
def test_slam_has_612_million_parameters(on_meta, config):
    model = on_meta(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    encoders = size(model.speech_encoder) + size(model.text_encoder) + size(model.multimodal_encoder)
    assert abs(encoders - 612e6) < 0.02 * 612e6
    assert abs(size(model) - 612e6) < 0.02 * 612e6


def test_the_24_layers_and_the_embedding(on_meta):
    """By the formula for one Conformer layer: 579.7 M in the layers, 32.8 M in the tied embedding."""
    model = on_meta("slam_stage1")
    d, ff, kernel = 1024, 4096, 5
    feed_forward = 2 * d * ff + d + ff
    attention = 4 * (d * d + d)
    convolution = (2 * d * d + 2 * d) + (kernel * d + d) + (d * d + d) + 2 * d
    layer = 2 * feed_forward + attention + convolution + 5 * 2 * d
    layers = [*model.speech_encoder.layers, *model.multimodal_encoder.layers]
    assert [size(each) for each in layers] == [layer] * 24
    assert abs(24 * layer - 579.7e6) < 1e6
    assert model.text_encoder.embedding.weight.shape == (32001, d)


def test_the_random_projection_trains_less(on_meta):
    gumbel = on_meta("slam_stage1")
    frozen = on_meta(
        "slam_stage1",
        "model.quantizer=null",
        "model.random_projection={num_codes: 8192, code_dim: 16}",
        "model.speech_loss.contrastive_weight=0",
        "model.speech_loss.diversity_weight=0",
    )
    d, k = 1024, 1024
    codebook, logits, context = k * d, d * k + k, d * d + d
    assert size(gumbel) - size(frozen) == codebook + logits + context + (d * k + k) - (8192 * d + 8192)
