"""Several machines train as one process does, survive the loss of one, and wait for a slow one: ``make cluster-test``.

The machines are network namespaces of this one; processes start by scripts/launch/torchrun.sh and speak gloo.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from network import cluster

from nemo_slam.training.checkpoints import finished_checkpoints

pytestmark = pytest.mark.skipif(
    os.environ.get("NEMO_SLAM_CLUSTER") is None or os.geteuid() != 0,
    reason="needs root, for network namespaces: make cluster-test",
)

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
NODES = [int(n) for n in os.environ.get("NEMO_SLAM_CLUSTER", "2").split(",")]
LIMIT = float(os.environ.get("NEMO_SLAM_LIMIT", "60"))  # seconds to end in after a loss
START_UP = 900  # seconds; NeMo's import, by several processes at once on a busy machine


@pytest.fixture(scope="module")
def settings(corpus, tokenizer_model):
    """Overrides of a run of seconds; SGD, so that the weights after one step show the first gradients."""
    tiny = "{d_model: 32, d_ff: 64, n_heads: 2, conv_norm_groups: 4, dropout: 0.0}"
    data = [
        *(
            f"data.{split}.{stream}={part}"
            for split, part in (("train_ds", "train"), ("validation_ds", "dev"))
            for stream, part in (
                ("speech.manifest_filepath", f"{corpus}/{part}.json"),
                ("pairs.manifest_filepath", f"{corpus}/{part}.json"),
                ("text.text_filepath", f"{corpus}/{part}.txt"),
            )
        ),
        "data.train_ds.speech.frames_per_step=800",
        "data.train_ds.pairs.frames_per_step=400",
        "data.train_ds.text.tokens_per_step=120",
    ]
    model = ["model=tiny", f"model.conformer={tiny}", "model.speech_encoder={num_layers: 1, conv_channels: 4}"]
    model += ["model.multimodal_encoder.num_layers=1", "model.text_encoder={vocab_size: 40, dropout: 0.0}"]
    model += ["model.quantizer.num_codes=16", "model.quantizer.code_dim=24", "model.validation_ds=null"]
    model += ["model.optim.name=sgd", "model.optim.lr=0.05", "~model.optim.betas", "~model.optim.sched"]
    run = ["data.prepare=null", f"data.tokenizer.model_path={tokenizer_model}", "data.num_workers=0", "probes=false"]
    run += ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1", f"trainer.max_steps={STEPS}"]
    run += ["checkpoint.every_n_steps=1", f"checkpoint.keep_last={STEPS}", "parallel.timeout_seconds=600"]
    return ["--config-name", "slam_stage2", *data, *model, *run]


@pytest.fixture
def logs(tmp_path):
    """Said in full when a test fails."""
    yield tmp_path
    for log in sorted(tmp_path.glob("*.log")):
        print(f"---- {log.name}\n{log.read_text()[-6000:]}")


def launch(nodes, settings, folder, name, *overrides):
    """The same command on every machine."""
    script = str(ROOT / "scripts/launch/torchrun.sh")
    environment = {"NODES": str(len(nodes)), "GPUS": "1", "HEAD": nodes[0].address, "OMP_NUM_THREADS": "1"}
    environment |= {"TORCHRUN": str(Path(sys.executable).parent / "torchrun"), "RUN_ID": name}
    command = [script, *settings, f"exp_manager.exp_dir={folder}", f"name={name}", *overrides]
    return [node.start(command, folder / f"{name}_{node.name}.log", environment) for node in nodes]


def finish(processes, seconds=START_UP):
    deadline = time.monotonic() + seconds
    return [process.wait(timeout=max(1, deadline - time.monotonic())) for process in processes]


def wait_for_step(folder, step, processes):
    deadline = time.monotonic() + START_UP
    while not any(done >= step for done, _ in finished_checkpoints(folder / "checkpoints")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "a machine ended early"
        time.sleep(0.02)


def weights(folder, step):
    (path,) = (path for done, path in finished_checkpoints(folder / "checkpoints") if done == step)
    return torch.load(path, weights_only=False)["state_dict"]


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if k == "loss" or "/" in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The run folder of one process with the same global batch."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "scripts/speech_pretrain.py", *settings, f"exp_manager.exp_dir={folder}", "name=alone"]
    subprocess.run([*command, "trainer.devices=1"], cwd=ROOT, check=True, capture_output=True)
    return folder / "alone"


@pytest.mark.parametrize("strategy", os.environ.get("NEMO_SLAM_STRATEGIES", "ddp,fsdp2").split(","))
@pytest.mark.parametrize("count", NODES)
def test_machines_train_as_one_process_and_wait_for_a_slow_one(settings, alone, logs, count, strategy):
    """One machine stands still for five seconds in the middle, and is slow from then on."""
    with cluster(count) as nodes:
        processes = launch(nodes, settings, logs, "together", f"parallel.strategy={strategy}")
        wait_for_step(logs / "together", 1, processes)
        nodes[-1].send(signal.SIGSTOP)
        time.sleep(5)
        reached = finished_checkpoints(logs / "together/checkpoints")[-1][0]
        time.sleep(1)
        assert finished_checkpoints(logs / "together/checkpoints")[-1][0] == reached < STEPS  # the others wait
        nodes[-1].send(signal.SIGCONT)
        with nodes[-1].slowed():
            assert finish(processes) == [0] * count
    tolerance = 1e-5  # float32: another order of summation
    for step in (1, STEPS):
        found = weights(logs / "together", step)
        for name, expected in weights(alone, step).items():
            torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance, msg=f"{step}: {name}")
    reference = losses(alone)
    assert len(reference) == STEPS
    for row, expected in zip(losses(logs / "together"), reference, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("count", NODES)
def test_a_machine_that_dies_is_named_and_the_run_resumes_exactly(settings, logs, count):
    """The others end within a minute; what follows is bit for bit the run that nothing happened to."""

    def log(node):
        return (logs / f"broken_{node.name}.log").read_text()

    with cluster(count) as nodes:
        processes = launch(nodes, settings, logs, "broken")
        wait_for_step(logs / "broken", 2, processes)
        nodes[-1].send(signal.SIGSTOP)  # no further step is finished: it dies in the middle of one
        time.sleep(1)
        nodes[-1].send(signal.SIGKILL)
        killed = time.monotonic()
        while not all(f"({nodes[-1].name})" in log(node) for node in nodes[:-1]):
            assert time.monotonic() - killed < LIMIT, "not every machine has named the one that died"
            time.sleep(0.2)
        named = time.monotonic() - killed
        statuses = finish(processes, seconds=LIMIT - named)
        print(
            f"{count} machines: the dead one named after {named:.1f} s, all ended after {time.monotonic() - killed:.1f}"
        )
        assert all(status != 0 for status in statuses)
        assert all("LostRankError" in log(node) for node in nodes[:-1])
        assert not any(node.processes() for node in nodes)
        steps = [step for step, _ in finished_checkpoints(logs / "broken/checkpoints")]
        assert 2 <= steps[-1] < STEPS
        assert finish(launch(nodes, settings, logs, "broken")) == [0] * count
        assert finish(launch(nodes, settings, logs, "whole")) == [0] * count
    assert any(f"resuming from step {steps[-1]}" in log.read_text() for log in logs.glob("broken_*.log"))
    found, expected = weights(logs / "broken", STEPS), weights(logs / "whole", STEPS)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for row, expected in zip(losses(logs / "broken"), losses(logs / "whole"), strict=True):
        assert row == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
