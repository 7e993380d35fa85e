"""scripts/speech_finetune.py: answers at once, and names a misspelt key's neighbour."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "speech_finetune.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("config", ["asr_ctc", "asr_rnnt", "asr_hybrid", "st", "mt", "text_classification"])
def test_every_config_is_printed(config):
    done = script("--config-name", config, "model=tiny", "--cfg", "job", "--resolve")
    assert done.returncode == 0, done.stderr
    assert f"name: {config}" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("freeze_encoder_step=5", "unknown key 'freeze_encoder_step'; did you mean 'freeze_encoder_steps'?"),
        ("data.train_ds.text_kee=x", "data.train_ds: unknown key 'text_kee'; did you mean 'text_key'?"),
        ("model=tinny", "Could not find 'model/tinny'"),
    ],
)
def test_a_misspelt_override_is_refused_with_the_nearest(override, message):
    done = script(override)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
