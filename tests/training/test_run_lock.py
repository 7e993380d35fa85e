"""A run folder is one live run's: a job that is started twice ends at once, and a kill leaves no lock."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from nemo_slam.config import ConfigError
from nemo_slam.finetuning import finetune as finetuning
from nemo_slam.training import pretrain as module
from nemo_slam.training import run_lock
from nemo_slam.training.run_lock import alone_in

# Another process that holds the lock, by nothing of ours, and says so.
HOLDER = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.fixture
def holder():
    """A function (folder) -> a live process that holds its lock."""
    processes = []

    def start(folder):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", HOLDER, str(folder / run_lock.FILE_NAME)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        out = processes[-1].stdout
        assert out is not None
        assert out.readline() == b"held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_start_leaves_the_first_ones_files_alone(pretrain_config, tmp_path, holder):
    cfg = pretrain_config(1, "name=twice", "trainer.max_steps=1")
    first = holder(tmp_path / "twice")
    part = tmp_path / "twice/checkpoints/step_000000008.ckpt.part"
    part.parent.mkdir()
    part.write_bytes(b"half a save")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/twice is in use by another run.*name=NAME"):
        module.pretrain(cfg)
    assert part.exists()
    assert not (tmp_path / "twice/metrics.csv").exists()
    first.kill()
    first.wait()
    assert (module.pretrain(cfg) / "metrics.csv").is_file()
    assert not part.exists()
    module.pretrain(cfg)  # as may every next start in the same process


def test_fine_tuning_is_kept_apart_too(tmp_path, monkeypatch, holder):
    """Refused before its model is made."""
    holder(tmp_path / "twice")
    task = SimpleNamespace(volume=("frames", 1.0))
    monkeypatch.setattr(finetuning, "SpeechTask", lambda *args: task)
    monkeypatch.setattr(finetuning, "prepare_corpus", lambda data: None)
    monkeypatch.setattr(finetuning, "make_trainer", lambda *args: SimpleNamespace(is_global_zero=True))
    cfg = {
        "seed": 1,
        "name": "twice",
        "exp_manager": {"exp_dir": str(tmp_path)},
        "init_from": None,
        "reinit_last_layers": 0,
        "freeze_encoder_steps": 0,
        "parallel": {},
        "early_stopping": {"patience": None},
        "trainer": {"log_every_n_steps": 1},
        "model": {"target": "any"},
        "data": {},
    }
    with pytest.raises(ConfigError, match="twice is in use by another run"):
        finetuning.finetune(OmegaConf.create(cfg))


def test_a_kill_frees_the_folder_though_its_workers_live_on(tmp_path):
    """As loader workers do, for seconds: they inherit what the run had open."""
    read, write = os.pipe()
    run = os.fork()
    if run == 0:
        try:
            with alone_in(tmp_path, is_global_zero=True):
                worker = os.fork()
                if worker == 0:
                    time.sleep(60)
                    os._exit(0)
                os.write(write, b"%d\n" % worker)
                time.sleep(60)
        finally:
            os._exit(1)
    worker = int(os.read(read, 20))
    try:
        with (
            pytest.raises(ConfigError, match=rf"\(process {run} on .*, since 20..-"),
            alone_in(tmp_path, is_global_zero=True),
        ):
            pass
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
        os.kill(worker, 0)  # it lives
        with alone_in(tmp_path, is_global_zero=True):
            assert f"process {os.getpid()} on" in (tmp_path / run_lock.FILE_NAME).read_text()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_other_ranks_need_no_lock(tmp_path, holder):
    holder(tmp_path)
    with alone_in(tmp_path, is_global_zero=False):
        pass


def test_a_file_system_without_locks_is_said_and_passed_over(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    messages: list[str] = []
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(run_lock.logging, "warning", messages.append)
    with alone_in(tmp_path, is_global_zero=True):
        pass
    assert [f"{tmp_path} cannot be locked (No locks available)" in message for message in messages] == [True]
