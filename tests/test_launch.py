"""Launch scripts, as far as they can be checked without a cluster: syntax, their command line, their schema."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "scripts/launch"
FINE_TUNING = ["scripts/speech_finetune.py", "--config-name", "asr_ctc", "data=librispeech"]
SHELL = [LAUNCH / "torchrun.sh", LAUNCH / "slurm.sbatch", ROOT / "docker/test_image.sh"]


def tool(name: str) -> str:
    """A program of the environment, beside its interpreter."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else shutil.which(name) or pytest.skip(f"{name} is not installed")


def put(folder: Path, name: str, body: str) -> None:
    """A program that stands for a cluster's own."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    result = subprocess.run([tool("shellcheck"), "--severity=info", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_dockerfile_is_clean():
    result = subprocess.run([tool("hadolint"), "--failure-threshold=info", "Dockerfile"], cwd=ROOT, capture_output=True)
    assert result.returncode == 0, result.stdout.decode()


def test_torchrun_gets_the_machines_and_the_run(tmp_path):
    put(tmp_path, "torchrun", 'printf "%s\\n" "$@"')
    put(tmp_path, "nvidia-smi", "echo GPU 0; echo GPU 1; echo GPU 2")
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [LAUNCH / "torchrun.sh", "--config-name", "slam_stage2", "model=tiny"]

    def arguments(**environment: str) -> list[str]:
        env = {"PATH": path, **environment}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.split()

    found = arguments(NODES="4", HEAD="node0")
    script = found.index("scripts/speech_pretrain.py")
    options = dict(zip(found[:script:2], found[1:script:2], strict=True))
    assert options["--nnodes"] == "4"
    assert options["--nproc-per-node"] == "3"
    assert options["--rdzv-endpoint"] == "node0:29500"
    tail = ["--config-name", "slam_stage2", "model=tiny", "trainer.num_nodes=4", "trainer.devices=3"]
    assert found[script + 1 :] == tail
    assert "trainer.devices=2" in arguments(GPUS="2")
    command = [LAUNCH / "torchrun.sh", *FINE_TUNING]
    found = arguments(NODES="4", HEAD="node0")
    assert "scripts/speech_pretrain.py" not in found
    assert found[script:] == [*FINE_TUNING, "trainer.num_nodes=4", "trainer.devices=3"]
    put(tmp_path, "nvidia-smi", "exit 9")
    result = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no GPU here" in result.stderr


def test_torchrun_knows_the_options(tmp_path):
    """The script's own options, parsed by the installed torchrun."""
    from torch.distributed.run import parse_args

    put(tmp_path, "torchrun", 'printf "%s\\n" "$@"')
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "2", "NODES": "3"}
    found = subprocess.run([LAUNCH / "torchrun.sh"], env=env, capture_output=True, text=True, check=True).stdout.split()
    parsed = parse_args(found)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("3", "2", 0)
    assert parsed.training_script == "scripts/speech_pretrain.py"


# ---- Slurm ---------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """A function (what srun does) -> status and log of the job, and what it asked of Slurm."""

    def run(srun: str, *, arguments=("--config-name", "slam_stage1", "data=paper"), signal_after=None, **environment):
        put(tmp_path, "srun", f'printf "%s\\n" "$@" > {tmp_path}/srun.log\n{srun}')
        put(tmp_path, "scancel", f'echo "$@" >> {tmp_path}/asked.log; touch {tmp_path}/told')
        put(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked.log')
        env = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[0-3]",
            "SLURM_NNODES": "4",
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_CPUS_PER_TASK": "12",
            "IMAGE": "/shared/nemo_slam.sqsh",
            "MOUNTS": "/shared",
            **environment,
        }
        job = subprocess.Popen(
            ["bash", LAUNCH / "slurm.sbatch", *arguments],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if signal_after is not None:
            while not (tmp_path / "srun.log").exists():
                time.sleep(0.01)
            job.send_signal(10)  # USR1
        log, _ = job.communicate(timeout=60)
        asked = (tmp_path / "asked.log").read_text().splitlines() if (tmp_path / "asked.log").exists() else []
        return job.returncode, log, asked, (tmp_path / "srun.log").read_text().splitlines()

    return run


def test_directives_of_the_batch_script():
    """Options as sbatch spells them, before the first command; a process for each GPU."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = dict(
        re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", x).groups() for x in lines if x.startswith("#SBATCH")
    )
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "exclusive", "time"}
    assert set(directives) == known | {"requeue", "open-mode", "output", "signal"}
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert directives["signal"].startswith("B:USR1@")  # to the script alone: Lightning would answer USR1 itself
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first_command for i, line in enumerate(lines) if line.startswith("#SBATCH"))


def test_a_finished_job_is_not_queued_again(slurm):
    status, log, asked, command = slurm("exit 0")
    assert (status, asked) == (0, []), log
    assert {"--container-image=/shared/nemo_slam.sqsh", "--cpus-per-task=12"} <= set(command)
    run = command[command.index("python3") :]
    assert run[1:5] == ["scripts/speech_pretrain.py", "--config-name", "slam_stage1", "data=paper"]
    assert run[5:] == ["trainer.num_nodes=4", "trainer.devices=8"]


def test_a_job_may_fine_tune(slurm):
    *_, command = slurm("exit 0", arguments=FINE_TUNING)
    assert command[command.index("python3") + 1 :] == [*FINE_TUNING, "trainer.num_nodes=4", "trainer.devices=8"]


def test_a_failed_job_is_not_queued_again(slurm):
    status, log, asked, _ = slurm("exit 1")
    assert (status, asked) == (1, []), log


def test_a_pre_empted_job_is_queued_again(slurm):
    """Slurm has told the steps itself; they saved."""
    status, log, asked, _ = slurm("exit 143")
    assert (status, asked) == (143, ["requeue 77"]), log


def test_a_job_out_of_time_saves_and_is_queued_again(slurm, tmp_path):
    """USR1 to the script becomes TERM to the steps; the script waits for their end."""
    saving = f"while [ ! -e {tmp_path}/told ]; do sleep 0.05; done; sleep 0.3; echo saved; exit 143"
    status, log, asked, _ = slurm(saving, signal_after=0)
    assert (status, asked) == (143, ["--signal=TERM 77", "requeue 77"]), log
    assert "saved" in log


def test_without_an_image_the_job_says_what_it_needs(slurm, tmp_path):
    put(tmp_path, "srun", "")
    result = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env={"PATH": os.environ["PATH"]}, capture_output=True)
    assert result.returncode != 0
    assert b"IMAGE=" in result.stderr


# ---- Kubernetes ----------------------------------------------------------------------------------


def test_the_kubernetes_job():
    """What the operator demands, and numbers that must agree."""
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]) <= {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs", "elasticPolicy"}
    assert isinstance(job["spec"]["nprocPerNode"], str)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    assert {r["restartPolicy"] for r in replicas.values()} <= {"Always", "OnFailure", "Never", "ExitCode"}
    machines = sum(r["replicas"] for r in replicas.values())
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert str(gpus) == job["spec"]["nprocPerNode"]
        assert f"trainer.num_nodes={machines}" in container["args"]
        assert f"trainer.devices={gpus}" in container["args"]
        assert (ROOT / container["command"][-1]).is_file()
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert all(isinstance(value, str) for value in environment.values())
        assert int(environment["PET_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("script", ["speech_pretrain", "speech_finetune"])
def test_the_jobs_config_composes(script):
    """The overrides of the Kubernetes job are keys of the config, also when its first lines make it fine-tune."""
    from hydra import compose, initialize_config_dir

    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    arguments = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["args"]
    folder = ROOT / "conf"
    if script == "speech_finetune":
        own = {"--config-name=slam_stage1": "--config-name=asr_ctc", "data=paper": "data=librispeech"}
        assert set(own) < set(arguments)
        arguments, folder = [*(own.get(a, a) for a in arguments), "init_from=/shared/slam.nemo"], folder / "finetuning"
    (config,) = (a.removeprefix("--config-name=") for a in arguments if a.startswith("--config-name="))
    with initialize_config_dir(str(folder), version_base="1.3"):
        cfg = compose(config, [a for a in arguments if not a.startswith("--")])
    assert (cfg.trainer.precision, cfg.trainer.num_nodes) == ("bf16-mixed", 8)
