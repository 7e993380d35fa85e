"""Several machines train as one process does, survive the loss of one, and wait for a slow one: ``make cluster-test``.

The machines are network namespaces of this one; processes start by scripts/launch/torchrun.sh and speak gloo. Those
whose time to end is measured are fresh ones; others are forked (`forked_torchrun.py`), which spares them NeMo's import.
Nothing has a limit on time while there is progress, but what the guide promises: to end within `LIMIT` of a loss.
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
from cluster_results import ClusterResults
from network import cluster

from nemo_slam.training.checkpoints import finished_checkpoints

pytestmark = pytest.mark.skipif(
    os.environ.get("NEMO_SLAM_CLUSTER") is None or os.geteuid() != 0,
    reason="needs root, for network namespaces: make cluster-test",
)

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
NODES = [int(n) for n in os.environ.get("NEMO_SLAM_CLUSTER", "2").split(",")]
LIMIT = 60  # seconds to end in after a loss
STALL = 300  # seconds without any progress after which a wait is given up
TOLERANCE = 1e-5  # of float32 sums in another order
LEARNING_RATE = 0.05
FRESH = str(Path(sys.executable).parent / "torchrun")


@pytest.fixture(scope="module")
def results():
    """Of the tests that pass; a file once all have."""
    cases = [(case, count) for count in NODES for case in ("sharded", "killed")]
    results = ClusterResults([*cases, ("cut off", 2)])
    yield results
    results.write()


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
    model += ["model.optim.name=sgd", f"model.optim.lr={LEARNING_RATE}", "~model.optim.betas", "~model.optim.sched"]
    run = ["data.prepare=null", f"data.tokenizer.model_path={tokenizer_model}", "data.num_workers=0", "probes=false"]
    run += ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1", f"trainer.max_steps={STEPS}"]
    run += ["checkpoint.every_n_steps=1", f"checkpoint.keep_last={STEPS}", "parallel.timeout_seconds=600"]
    return ["--config-name", "slam_stage2", *data, *model, *run]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """A torchrun for scripts/launch/torchrun.sh whose processes are forks of one that has imported NeMo."""
    folder = tmp_path_factory.mktemp("forked")
    command = [sys.executable, str(Path(__file__).with_name("forked_torchrun.py"))]
    (folder / "torchrun").write_text(f'#!/bin/sh\nexec {" ".join(command)} {folder}/socket "$@"\n')
    (folder / "torchrun").chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    server = [*command, "serve", f"{folder}/socket"]
    with subprocess.Popen(server, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "ready\n":
            assert line, "the process to fork from has ended"
        yield str(folder / "torchrun")
        process.kill()


@pytest.fixture
def logs(tmp_path):
    """Said in full when a test fails."""
    yield tmp_path
    for log in sorted(tmp_path.glob("*.log")):
        print(f"---- {log.name}\n{log.read_text()[-6000:]}")


class Run:
    """The same command on every machine.

    Args:
        torchrun: the program to start with.
        folder: of runs and logs.
        name: of the run.
    """

    def __init__(self, nodes, torchrun, settings, folder, name, *overrides):
        self.nodes, self.folder, self.name = nodes, folder, name
        environment = {"NODES": str(len(nodes)), "GPUS": "1", "HEAD": nodes[0].address, "OMP_NUM_THREADS": "1"}
        environment |= {"TORCHRUN": torchrun, "RUN_ID": name}
        if torchrun != FRESH:
            environment |= {"PET_RUN_PATH": "1", "PET_START_METHOD": "fork"}
        command = [str(ROOT / "scripts/launch/torchrun.sh"), *settings, f"exp_manager.exp_dir={folder}", f"name={name}"]
        self.processes = [node.start([*command, *overrides], self.log(node), environment) for node in nodes]

    def log(self, node) -> Path:
        return self.folder / f"{self.name}_{node.name}.log"

    def checkpoints(self):
        return finished_checkpoints(self.folder / self.name / "checkpoints")

    def wait(self, condition) -> None:
        """Until ``condition()``, as long as something goes on; signs of life alone take hours for a second."""
        before, since = None, time.monotonic()
        while not condition():
            logged = sum(self.log(node).stat().st_size for node in self.nodes)
            now = (logged, len(self.checkpoints()), sum(node.seconds() for node in self.nodes) // 2)
            if now != before:
                before, since = now, time.monotonic()
            assert time.monotonic() - since < STALL, f"{self.name} stands still: {now}"
            time.sleep(0.05)

    def wait_for_step(self, step) -> None:
        def reached():
            assert all(process.poll() is None for process in self.processes), f"{self.name}: a machine ended early"
            return any(done >= step for done, _ in self.checkpoints())

        self.wait(reached)

    def finish(self) -> list[int]:
        self.wait(lambda: all(process.poll() is not None for process in self.processes))
        return [process.returncode for process in self.processes]

    def weights(self, step):
        (path,) = (path for done, path in self.checkpoints() if done == step)
        return torch.load(path, weights_only=False)["state_dict"]

    def losses(self):
        with (self.folder / self.name / "metrics.csv").open(newline="") as file:
            return [{k: float(v) for k, v in row.items() if k == "loss" or "/" in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(forked, settings, tmp_path_factory):
    """The run of one process with the same global batch."""
    with cluster(1) as nodes:
        run = Run(nodes, forked, settings, tmp_path_factory.mktemp("alone"), "alone")
        assert run.finish() == [0], run.log(nodes[0]).read_text()[-6000:]
    return run


def assert_trained_alike(run, reference, tolerance):
    """Weights after the first step, which show its gradients, and after the last; every loss of every step.

    Returns the largest differences; of the gradients as they were applied, clipped, that of the weights over the rate.
    """
    apart = {}
    for step in (1, STEPS):
        worst = 0.0
        found = run.weights(step)
        for name, expected in reference.weights(step).items():
            torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance, msg=f"{step}: {name}")
            worst = max(worst, float((found[name].double() - expected.double()).abs().max()))
        apart[step] = worst
    assert len(reference.losses()) == STEPS
    losses = 0.0
    for row, expected in zip(run.losses(), reference.losses(), strict=True):
        assert row == pytest.approx(expected, rel=10 * tolerance, abs=10 * tolerance, nan_ok=True)
        losses = max([losses, *(abs(row[name] - expected[name]) for name in row if row[name] == row[name])])
    print(f"\n{len(run.nodes)} machines, {run.name}: weights within {max(apart.values()):.1e} of the reference")
    return {
        "losses": losses,
        "gradients_of_the_first_step": apart[1] / LEARNING_RATE,
        "weights_after_the_first_step": apart[1],
        f"weights_after_step_{STEPS}": apart[STEPS],
    }


@pytest.mark.parametrize("count", NODES)
def test_shards_on_several_machines_train_as_one_process(forked, settings, alone, logs, results, count):
    with cluster(count) as nodes:
        run = Run(nodes, forked, settings, logs, "fsdp2", "parallel.strategy=fsdp2")
        assert run.finish() == [0] * count
    apart = assert_trained_alike(run, alone, TOLERANCE)
    results.passed("sharded", count, "fsdp2", largest_difference=apart)


@pytest.mark.parametrize("count", NODES)
def test_a_slow_machine_slows_a_dead_one_is_named_and_the_run_resumes_exactly(
    forked, settings, alone, logs, results, count
):
    """Machines train as one process does; what goes on after a loss is bit for bit the run that nothing happened to."""
    with cluster(count) as nodes:
        whole = Run(nodes, forked, settings, logs, "whole")
        whole.wait_for_step(1)
        nodes[-1].send(signal.SIGSTOP)
        time.sleep(3)
        reached = whole.checkpoints()[-1][0]
        time.sleep(2)
        assert whole.checkpoints()[-1][0] == reached < STEPS  # the others wait
        nodes[-1].send(signal.SIGCONT)
        with nodes[-1].slowed():
            assert whole.finish() == [0] * count
        apart = assert_trained_alike(whole, alone, TOLERANCE)

        broken = Run(nodes, FRESH, settings, logs, "broken")
        broken.wait_for_step(2)
        nodes[-1].send(signal.SIGSTOP)  # no further step is finished: it dies in the middle of one
        time.sleep(1)
        nodes[-1].send(signal.SIGKILL)
        end = assert_the_others_end(broken, nodes[-1], nodes[:-1])
        last, _ = broken.checkpoints()[-1]
        assert 2 <= last < STEPS
        resumed = Run(nodes, forked, settings, logs, "broken")
        assert resumed.finish() == [0] * count
    assert any(f"resuming from step {last}" in resumed.log(node).read_text() for node in nodes)
    found, expected = resumed.weights(STEPS), whole.weights(STEPS)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for row, unbroken in zip(resumed.losses(), whole.losses(), strict=True):
        assert row == pytest.approx(unbroken, rel=0, abs=0, nan_ok=True)
    same = all(torch.equal(found[name], expected[name]) for name in expected)
    exact = {"resumed_from_step": last, "compared_after_step": STEPS, "resumed_bit_for_bit": same}
    results.passed("killed", count, "ddp", largest_difference=apart, **end, **exact)


def test_a_machine_that_is_cut_off_is_named(forked, settings, logs, results):
    """It closes no connection, as one without power: nobody would ever hear of it. It names the other side itself."""
    with cluster(2) as nodes:
        run = Run(nodes, forked, settings, logs, "cut", "trainer.max_steps=100000", "checkpoint.every_n_steps=1000")
        run.wait(lambda: (logs / "cut/metrics.csv").exists())
        nodes[1].unplug()
        end = assert_the_others_end(run, nodes[1], nodes[:1])
        run.wait(lambda: f"no answer from rank 0 ({nodes[0].name})" in run.log(nodes[1]).read_text())
    results.passed("cut off", 2, "ddp", **end)


def assert_the_others_end(run, lost, others):
    """Each says who is lost, and no process is left, within the time that the guide promises. Returns what was seen."""
    since = time.monotonic()
    named = None
    while any(node.processes() for node in others):
        if named is None and all(f"({lost.name})" in run.log(node).read_text() for node in others):
            named = time.monotonic() - since
        assert time.monotonic() - since < LIMIT, f"named after {named} s, but not all have ended"
        time.sleep(0.1)
    ended = time.monotonic() - since
    for node in others:
        assert f"no answer from rank {lost.number - 1} ({lost.name})" in run.log(node).read_text(), node.name
        assert "LostRankError" in run.log(node).read_text()
    assert all(run.processes[node.number - 1].wait() != 0 for node in others)
    print(f"\n{len(run.nodes)} machines, {run.name}: named after {named or ended:.1f} s, ended after {ended:.1f} s")
    said = {
        node.name: [line for line in run.log(node).read_text().splitlines() if "LostRankError" in line][-1].strip()
        for node in others
    }
    return {
        "lost": lost.name,
        "named_after_seconds": round(named or ended, 1),
        "ended_after_seconds": round(ended, 1),
        "message_last_line": said,
    }
