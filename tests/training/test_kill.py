"""A run that SIGKILL ends, at any step or around any save, goes on as if nothing had happened.

The moment is another one in each run of the tests. A failure shows it, with the seed that repeats it:
KILL_SEED=123 pytest tests/training/test_kill.py
"""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from kill_worker import MOMENTS, SAVE_EVERY, STEPS, Kill, checkpoint_name, train
from test_resume import metrics, steps

from nemo_slam.training import pretrain as module
from nemo_slam.training.checkpoints import finished_checkpoints

SEED = int(os.environ.get("KILL_SEED") or int.from_bytes(os.urandom(4), "big"))
OPTIONS = (
    f"trainer.max_steps={STEPS}",
    f"checkpoint.every_n_steps={SAVE_EVERY}",
    "checkpoint.keep_last=1",
    "data.num_workers=2",
    "trainer.accumulate_grad_batches=2",
)
"""With dropout, validations in between and streams that wrap, as in test_resume.py."""


@pytest.fixture(scope="module")
def whole_runs():
    return {}


@pytest.fixture
def whole(whole_runs, pretrain_config):
    """The unbroken run, once for all."""
    if not whole_runs:
        whole_runs["rows"] = metrics(module.pretrain(pretrain_config(2, "name=whole", *OPTIONS)))
    return whole_runs["rows"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill(pretrain_config, monkeypatch, whole, moment):
    when = Kill.draw(moment, SEED)
    told = f"KILL_SEED={SEED} repeats this: {when}"
    print(told)  # for an error that is no assertion
    cfg = pretrain_config(2, "name=killed", *OPTIONS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_slam.training.pretrain"])
    process = context.Process(target=train, args=(cfg, when))
    process.start()
    process.join(timeout=600)
    assert process.exitcode == -signal.SIGKILL, told
    checkpoints = Path(cfg.exp_manager.exp_dir) / "killed" / "checkpoints"
    assert [step for step, _ in finished_checkpoints(checkpoints)] == when.kept, told
    assert len(list(checkpoints.glob("*.part"))) == (moment == MOMENTS[1]), told

    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    done = module.pretrain(cfg)
    assert any(f"resuming from step {when.kept[-1]}" in text for text in messages), told
    assert steps(done) == list(range(1, STEPS + 1)), told
    assert metrics(done) == whole, told
    assert [path.name for path in checkpoints.iterdir()] == [checkpoint_name(STEPS)], told
