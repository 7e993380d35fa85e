"""A misspelt override or a key that nothing reads is refused at once, with the nearest key."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from nemo_slam.command_line import FINETUNING_KEYS, RUN_KEYS, check_finetuning_keys, check_run_keys
from nemo_slam.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def script(name: str, *arguments: str) -> tuple[int, str, float]:
    """Exit status, what was said and processor seconds of a script."""
    env = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    before = os.times()
    result = subprocess.run(
        [sys.executable, f"scripts/{name}", *arguments], cwd=ROOT, capture_output=True, text=True, env=env
    )
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return result.returncode, result.stdout + result.stderr, seconds


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_step=5", "trainer: unknown key 'max_step'; did you mean 'max_steps'?"),
        ("model.optim.lrr=1", "model.optim: unknown key 'lrr'; did you mean 'lr'?"),
        ("sead=1", "unknown key 'sead'; did you mean 'seed'?"),
        ("data.train_ds.speach.window=1", "data.train_ds: unknown key 'speach'; did you mean 'speech'?"),
        ("+checkpoint.every_n_step=1", "checkpoint: unknown key 'every_n_step'; did you mean 'every_n_steps'?"),
        ("+data.x=1", "data: unknown key 'x' (known: num_workers,"),
        ("+x=1", "the top level of the config: unknown key 'x' (known: checkpoint,"),
        ("checkpoint=5", "checkpoint must be a group of keys (every_n_steps, keep_last), got 5"),
        ("model=tinny", "Could not find 'model/tinny'"),
    ],
)
def test_refused_in_a_second_without_a_traceback(override, message):
    status, said, seconds = script("speech_pretrain.py", override)
    assert status == 1
    assert said.startswith("error: ")
    assert message in said
    assert "Traceback" not in said
    assert seconds < 2.5


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("asr_ctc", "freeze_encoder_step=5", "unknown key 'freeze_encoder_step'; did you mean 'freeze_encoder_steps'?"),
        ("asr_ctc", "+early_stopping.patince=5", "early_stopping: unknown key 'patince'; did you mean 'patience'?"),
        ("st", "+data.train_ds.target_key=x", "data.train_ds: unknown key 'target_key'; did you mean 'text_key'?"),
        ("mt", "+data.train_ds.txt_key=x", "data.train_ds: unknown key 'txt_key'; did you mean 'text_key'?"),
        ("mt", "+data.languages=es", "data: unknown key 'languages'; did you mean 'language'?"),
    ],
)
def test_fine_tuning_refuses_in_a_second_too(config, override, message):
    status, said, seconds = script("speech_finetune.py", "--config-name", config, override)
    assert status == 1
    assert said.startswith("error: ")
    assert message in said
    assert seconds < 2.5


@pytest.mark.parametrize(
    "name", ["speech_pretrain.py", "speech_finetune.py", "transcribe.py", "evaluate.py", "export_nemo.py"]
)
def test_help_comes_at_once(name):
    status, said, seconds = script(name, "--help")
    assert status == 0
    assert f"python scripts/{name}" in said
    assert seconds < 2.5


def composed(config: str, *overrides: str, folder: Path = CONF):
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(config, overrides=list(overrides))


CONFIGS = [path.stem for path in CONF.glob("*.yaml")]
DATA = [path.stem for path in (CONF / "data").glob("*.yaml")]


@pytest.mark.parametrize(("config", "data"), list(itertools.product(CONFIGS, DATA)))
def test_every_config_passes(config, data):
    check_run_keys(composed(config, f"data={data}"))


FINETUNING = CONF / "finetuning"
TEXT_DATA = {"texts", "prompts_text_translation", "prompts_language"}
RECIPES = [
    (config.stem, data.stem)
    for config in FINETUNING.glob("*.yaml")
    for data in (FINETUNING / "data").glob("*.yaml")
    if (data.stem in TEXT_DATA) == (config.stem in ("mt", "text_classification"))
]


@pytest.mark.parametrize(("config", "data"), RECIPES)
def test_every_fine_tuning_config_passes(config, data):
    check_finetuning_keys(composed(config, f"data={data}", folder=FINETUNING))


def test_the_known_keys_of_fine_tuning_are_those_of_its_configs():
    """Each is in some config."""
    found: dict[str, set[str]] = {where: set() for where in FINETUNING_KEYS}
    for config, data in RECIPES:
        cfg = composed(config, f"data={data}", folder=FINETUNING)
        for where in FINETUNING_KEYS:
            node = cfg
            for part in filter(None, where.split(".")):
                node = (node or {}).get(part)
            found[where] |= set(node or ())
    assert {where: set(keys) for where, keys in FINETUNING_KEYS.items()} == {
        where: keys - {"hydra"} for where, keys in found.items()
    }


def test_the_known_keys_are_those_of_the_configs():
    """None is known that no config has: what nothing offers, nothing reads."""
    cfg = composed("slam_stage1")
    for where, keys in RUN_KEYS.items():
        node = cfg
        for part in filter(None, where.split(".")):
            node = node[part]
        assert set(keys) == set(node) - {"hydra"}, where


@pytest.mark.parametrize("override", ["+guard.histori=3", "+exp_manager.exp_dri=3", "+data.validation_ds.texts={}"])
def test_refused_in_any_group(override):
    with pytest.raises(ConfigError, match="did you mean"):
        check_run_keys(composed("slam_stage2", override))


@pytest.mark.parametrize(
    ("config", "folder", "check"),
    [("slam_stage1", CONF, check_run_keys), ("asr_ctc", CONF / "finetuning", check_finetuning_keys)],
)
@pytest.mark.parametrize("seed", ["-1", "abc", "1.5", "null", "2147483648"])
def test_a_seed_is_a_number_that_every_generator_takes(config, folder, check, seed):
    with pytest.raises(ConfigError, match=r"seed must be a whole number from 0 to 2\^31 - 1, got"):
        check(composed(config, f"seed={seed}", folder=folder))
    check(composed(config, "seed=2147483647", folder=folder))


def test_a_key_that_others_are_built_from_is_read():
    corpus = "+data.corpus=/data/x"
    with pytest.raises(ConfigError, match="unknown key 'corpus'"):
        check_run_keys(composed("slam_stage1", corpus))
    check_run_keys(composed("slam_stage1", corpus, "data.root=${data.corpus}/prepared"))


def test_errors_of_the_run_keep_their_traceback(tmp_path):
    """Only a config's fault is a single line."""
    script = tmp_path / "script.py"
    script.write_text(
        "from nemo_slam import command_line\n"
        f"@command_line.main({str(CONF)!r}, 'slam_stage1')\n"
        "def main(cfg):\n"
        "    raise RuntimeError('a fault of ours')\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RuntimeError: a fault of ours" in result.stderr
