"""A run that SIGKILL ends, at a step or around a save, goes on as if nothing had happened."""

import multiprocessing
import signal
from pathlib import Path

import pytest
from kill_worker import MOMENTS, train
from test_resume import metrics, steps

from nemo_slam.training import pretrain as module
from nemo_slam.training.checkpoints import finished_checkpoints

OPTIONS = ("checkpoint.keep_last=1", "data.num_workers=2")


@pytest.fixture(scope="module")
def whole_runs():
    return {}


@pytest.fixture
def whole(whole_runs, pretrain_config):
    """The unbroken run, once for all."""
    if not whole_runs:
        whole_runs["rows"] = metrics(module.pretrain(pretrain_config(2, "name=whole", *OPTIONS)))
    return whole_runs["rows"]


@pytest.mark.parametrize(
    ("moment", "kept", "resumed"), [(MOMENTS[0], [4], 4), (MOMENTS[1], [4], 4), (MOMENTS[2], [4, 8], 8)], ids=MOMENTS
)
def test_sigkill(pretrain_config, monkeypatch, whole, moment, kept, resumed):
    cfg = pretrain_config(2, "name=killed", *OPTIONS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_slam.training.pretrain"])
    process = context.Process(target=train, args=(cfg, moment))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    checkpoints = Path(cfg.exp_manager.exp_dir) / "killed" / "checkpoints"
    assert [step for step, _ in finished_checkpoints(checkpoints)] == kept
    assert len(list(checkpoints.glob("*.part"))) == (moment == MOMENTS[1])

    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    done = module.pretrain(cfg)
    assert any(f"resuming from step {resumed}" in text for text in messages)
    assert steps(done) == list(range(1, 13))
    assert metrics(done) == whole
    assert [path.name for path in checkpoints.iterdir()] == ["step_000000012.ckpt"]
