"""Every key under conf/ is read by something: a key that nothing reads is a bug, as is one that is taken silently."""

from __future__ import annotations

import inspect
import itertools
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def composed(folder: Path, config: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(config, overrides=list(overrides))


STAGES = [*itertools.product(names(CONF), names(CONF / "model"), ["prompts"])]
STAGES += [("slam_stage2", "tiny", data) for data in names(CONF / "data") if data != "prompts"]
FINETUNING = list(itertools.product(names(CONF / "finetuning"), names(CONF / "finetuning/model")))


@pytest.fixture(params=STAGES, ids="-".join)
def stage(request) -> DictConfig:
    """A pre-training config, resolved as the script resolves it."""
    config, model, data = request.param
    cfg = composed(CONF, config, f"model={model}", f"data={data}")
    text = OmegaConf.to_yaml(cfg).replace("???", "somewhere")  # paths that only the user knows
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.create(text), resolve=True))


@pytest.fixture(params=FINETUNING, ids="-".join)
def finetuning(request) -> DictConfig:
    config, model = request.param
    return composed(CONF / "finetuning", config, f"model={model}")


def test_there_are_configs():
    assert {"slam_stage1", "slam_stage2"} <= {config for config, _, _ in STAGES}
    assert {"tiny", "base", "slam"} <= {model for _, model, _ in STAGES}


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def test_model_keys(stage):
    from nemo_slam.models.settings import OTHER_KEYS, model_settings

    settings = model_settings(stage.model)
    read = {field.name for field in fields(settings)} | OTHER_KEYS
    assert set(stage.model) <= read
    stage.model.speech_encodr = {"num_layers": 2}
    with pytest.raises(ValueError, match="'speech_encodr'; did you mean 'speech_encoder'"):
        model_settings(stage.model)


def test_nested_model_keys(stage):
    """A misspelt key inside any group of the model is refused with the group's name."""
    from nemo_slam.models.settings import OTHER_KEYS, model_settings

    for group, node in stage.model.items():
        if isinstance(node, DictConfig) and group not in OTHER_KEYS:
            wrong = OmegaConf.merge(stage.model, {group: {"mispelt": 1}})
            with pytest.raises(ValueError, match=rf"model\.{group}.*unknown key 'mispelt'"):
                model_settings(wrong)


def test_preprocessor_keys(stage):
    from nemo.core.classes import Serialization

    preprocessor = Serialization.from_config_dict(stage.model.preprocessor)
    allowed = parameters(type(preprocessor).__init__) | {"_target_"}
    assert set(stage.model.preprocessor) <= allowed


def test_stream_keys(stage):
    from nemo_slam.data.config import ConfigError, parse_streams

    for split in ("train_ds", "validation_ds"):
        assert parse_streams(stage.data[split], split)
        assert stage.model[split] == stage.data[split]
        for stream in stage.data[split]:
            wrong = OmegaConf.merge(stage.data[split], {stream: {"mispelt": 1}})
            with pytest.raises(ConfigError, match=rf"{split}\.{stream}: unknown key 'mispelt'"):
                parse_streams(wrong, split)


def test_optimizer_and_schedule_keys(stage):
    """Each name exists in NeMo's registry, each other key is an argument of it."""
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    from nemo_slam.training.optimizers import register

    register()
    optim = stage.model.optim
    assert set(optim) - {"name", "sched"} <= parameters(AVAILABLE_OPTIMIZERS[optim.name].__init__)
    schedule = AVAILABLE_SCHEDULERS[optim.sched.name]
    allowed = set().union(*(parameters(cls.__init__) for cls in schedule.__mro__ if "__init__" in vars(cls)))
    assert set(optim.sched) - {"name"} <= allowed - {"args", "kwargs", "optimizer"}


def test_trainer_keys(stage):
    from lightning.pytorch import Trainer

    assert set(stage.trainer) <= parameters(Trainer.__init__)


def test_experiment_manager_keys(stage):
    from nemo.utils.exp_manager import ExpManagerConfig

    assert set(stage.exp_manager) <= {field.name for field in fields(ExpManagerConfig)}


def test_checkpoint_keys(stage):
    from nemo_slam.training.checkpoints import StepCheckpoint

    assert set(stage.checkpoint) <= parameters(StepCheckpoint.__init__) - {"folder"}


def test_guard_keys(stage):
    from nemo_slam.training.guards import StepGuard

    assert set(stage.guard) == parameters(StepGuard.__init__) - {"folder"}


def test_finetuning_configs_compose(finetuning):
    from lightning.pytorch import Trainer

    assert set(finetuning.trainer) <= parameters(Trainer.__init__)


@pytest.mark.parametrize("folder", [CONF, CONF / "finetuning"], ids=["pretraining", "finetuning"])
def test_our_own_keys_are_read(folder):
    """Keys that no library takes are read as cfg.KEY or GROUP.KEY, or another key is built from them."""
    sources = "\n".join(path.read_text() for path in (ROOT / "nemo_slam").rglob("*.py"))
    configs = "\n".join(path.read_text() for path in CONF.rglob("*.yaml"))
    for config in names(folder):
        cfg = composed(folder, config)
        own = [*cfg, *(f"checkpoint.{key}" for key in cfg.checkpoint)]
        own += [f"data.{key}" for key in cfg.data if key not in ("train_ds", "validation_ds")]
        for key in own:
            read = re.search(rf"\b{re.escape(key if '.' in key else 'cfg.' + key)}\b", sources)
            assert read or f"${{{key}" in configs, f"{config}: nothing reads {key}"


def test_an_unknown_key_is_an_error():
    for override in ("model.optm.lr=1", "sead=1", "trainer.max_step=5", "data.tran_ds=null", "checkpoint.keep=1"):
        with pytest.raises(Exception, match=override.partition("=")[0]):
            composed(CONF, "slam_stage1", override)
