"""The benchmark of a training step: its arithmetic, its mixes, its result file; gpu-check where there is no GPU."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import step_flops
import step_goals
import train_step
from step_parts import PARTS, Timeline
from step_workload import MIXES, Batch, batches, our_encoder, resolved_config, stock_encoder

FOLDER = Path(train_step.__file__).parent
SMALL = [
    "model.conformer.d_model=32",
    "model.conformer.d_ff=64",
    "model.conformer.n_heads=2",
    "model.conformer.conv_norm_groups=4",
    "model.speech_encoder.num_layers=1",
    "model.speech_encoder.conv_channels=4",
    "model.multimodal_encoder.num_layers=2",
    "model.quantizer.code_dim=24",
]


@pytest.fixture(scope="module")
def config():
    return resolved_config("tiny", "slam_stage2", SMALL)


def test_mixes_have_the_padding_that_they_promise():
    share = {}
    for mix in MIXES:
        found = batches(mix, 6000, 6)
        assert len(found) == 6
        for batch in found:
            assert 3000 < batch.total < 9000
        share[mix] = 1 - sum(b.total for b in found) / sum(len(b.frames) * int(b.frames.max()) for b in found)
    assert share["shuffled"] > 0.35
    assert 0.2 < share["loose"] < share["shuffled"]
    assert share["sorted"] < share["bucketed"] < 0.15
    assert share["sorted"] < 0.05
    assert all(
        (a.frames == b.frames).all() for a, b in zip(batches("loose", 600, 3), batches("loose", 600, 3), strict=True)
    )


def test_both_encoders_are_of_the_same_size(config):
    ours, stock = (sum(p.numel() for p in make(config).parameters()) for make in (our_encoder, stock_encoder))
    width = config.model.conformer.d_model
    assert ours - stock == width * width + width + 2 * width  # our projection and modality vectors


def test_counted_arithmetic_is_pytorchs(config):
    """On utterances of one length, where nothing is padded and gaps between utterances are known."""
    from torch.utils.flop_counter import FlopCounterMode

    frames = np.full(3, 121)
    encoder = our_encoder(config).eval()
    features, lengths = Batch(frames).features(torch.device("cpu"), 80)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(audio_signal=features, length=lengths)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op))
    width, rows = config.model.conformer.d_model, step_flops.rows_of(frames)
    conformer = config.model.conformer
    # By hand, but what is no product of matrices there: the depthwise convolution and attention.
    layers = step_flops.layers(rows, conformer, 3)
    layers -= 3 * rows.sum() * 2 * width * conformer.conv_kernel_size + 3 * 4 * width * np.square(rows).sum()
    projection = 2 * rows.sum() * width * width
    out = 2 * config.model.speech_encoder.conv_channels * 20 * width * rows.sum()
    assert products == pytest.approx(layers + projection + out, rel=1e-6)
    convolutions = sum(n for op, n in counts.items() if "convolution" in str(op))
    expected = step_flops.front_end(frames, config.model) - out
    assert expected < convolutions < 1.1 * expected  # and the gaps


def test_parts_sum_to_the_whole():
    timeline = Timeline(torch.device("cpu"))
    timeline.mark("start")
    for part in (*PARTS, "losses"):
        sum(range(200_000))
        timeline.mark(part)
    seconds = timeline.seconds()
    assert set(seconds) == set(PARTS)
    assert all(value > 0 for value in seconds.values())
    assert seconds["losses"] > 1.2 * seconds["data"]
    assert sum(timeline.seconds().values()) == 0


def test_a_run_writes_every_part_and_implementation(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--model", "tiny", "--device", "cpu", "--frames", "500", "--batches", "1", "--repeats", "1"]
    arguments += ["--mixes", "bucketed", "--out", str(out), "--set", *SMALL]
    assert train_step.main(arguments) == 0
    assert "x stock" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert {"device", "torch", "commit", "time", "load_average", "clock", "peak_source"} <= set(result)
    assert [row["implementation"] for row in result["encoders"]] == ["stock", "ours"]
    for row in result["encoders"]:
        assert row["frames_per_second"] == pytest.approx(row["frames"] / row["seconds"])
        assert 0 < row["flops_per_second"] < 2 * result["peak_flops_per_second"]
    (step,) = result["steps"].values()
    assert set(step["parts_seconds"]) == set(PARTS)
    assert all(value > 0 for value in step["parts_seconds"].values())
    assert step["seconds"] == pytest.approx(sum(step["parts_seconds"].values()))
    assert step["tokens"] > 0


def test_on_a_gpu_one_implementation_is_gone_before_the_next_is_made(config, monkeypatch):
    import step_encoders

    class Step:
        def __call__(self, *inputs):
            pass

    class OnGPU:
        def __init__(self):
            self.config, self.device, self.made = config, SimpleNamespace(type="cuda"), []

        def make(self, name):
            assert not any(step() for step in self.made), "the one before is still held"
            made = Step()
            self.made.append(weakref.ref(made))
            return made

    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1)
    monkeypatch.setattr(step_encoders, "timed", lambda step, device: step() or 1.0)
    monkeypatch.setattr(Batch, "features", lambda *_: ())
    rows: list[dict] = []
    encoders = OnGPU()
    step_encoders.compare(["stock", "ours"], {"sorted": [Batch(np.array([40, 50]))]}, encoders, 2, rows.append)
    assert [row["implementation"] for row in rows] == ["stock", "ours"]
    assert len(encoders.made) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("gpu_check.py", "gpu-check needs an NVIDIA GPU"),
        ("fp8_losses.py", "Transformer Engine needs an NVIDIA GPU"),
        ("train_step.py --device cuda", "no CUDA device"),
    ],
)
def test_without_a_gpu_it_says_so_and_fails(script, message, tmp_path):
    name, *arguments = script.split()
    before = set((FOLDER / "results").glob("*")) if (FOLDER / "results").is_dir() else set()
    result = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert (set((FOLDER / "results").glob("*")) if (FOLDER / "results").is_dir() else set()) == before


def test_gpu_check_stays_under_nine_minutes_and_names_files_that_exist(tmp_path):
    import gpu_check

    assert gpu_check.LIMIT < 540
    parts = gpu_check.parts(tmp_path, ["gemm", "attention"])
    assert [part.name for part in parts] == ["tests", "kernels", "train_step", "fp8_losses"]
    assert [part.name for part in gpu_check.parts(tmp_path, [])] == ["tests", "kernels", "train_step"]
    for part in parts:
        paths = [word for word in part.command if word.endswith(".py") or word == "tests/gpu"]
        assert paths
        assert all((gpu_check.ROOT / path).exists() for path in paths)


def test_gpu_check_runs_a_part_with_the_paths_of_a_source_checkout(tmp_path, capsys):
    import gpu_check

    code = "import nemo_slam, slam_kernels, sys; print('found both'); sys.exit(int(sys.argv[1]))"
    assert gpu_check.run(gpu_check.Part("good", ["-c", code, "0"], 60), tmp_path, 60)["outcome"] == "passed"
    assert "found both" in capsys.readouterr().out
    assert (
        gpu_check.run(gpu_check.Part("bad", ["-c", code, "3"], 60), tmp_path, 60)["outcome"] == "failed with status 3"
    )
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]])"
    slow = gpu_check.Part("slow", ["-c", child, str(tmp_path)], 1)
    assert gpu_check.run(slow, tmp_path, 0.5)["outcome"].startswith("cut after")
    for _ in range(100):  # nor does what it started live on, once the system has noticed
        if not alive(str(tmp_path)):
            break
        time.sleep(0.1)
    assert not alive(str(tmp_path))


def alive(argument: str) -> bool:
    """Whether a process has this among its arguments."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes():
                return True
    return False


def test_gpu_check_tells_what_failed_and_which_goals_are_met(tmp_path):
    import gpu_check

    case = '<testcase classname="a" name="{}">{}</testcase>'
    cases = case.format("x", '<failure message="too far">trace</failure>') + case.format("y", "")
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = gpu_check.count_tests(tmp_path / "tests.xml")
    assert found == {"passed": 1, "failed": 1, "skipped": 0, "failures": {"a::x": "too far"}}
    assert gpu_check.count_tests(tmp_path / "none.xml") is None
    for name, goals in (("kernels", [{"goal": "a"}]), ("train_step", [{"goal": "b"}]), ("summary", [{"goal": "c"}])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"goals": goals}))
    assert gpu_check.goals(tmp_path) == [{"goal": "a"}, {"goal": "b"}]


def test_goals_of_a_step():
    def row(name, speed, mix="bucketed", flops=1.0):
        found = {"mix": mix, "implementation": name, "frames_per_second": speed, "padding_share": 0.3}
        return {**found, "flops_per_second": flops}

    rows = [row("stock", 100.0), row("ours", 160.0, flops=44.0), row("ours, fp8 gemm", 200.0)]
    rows += [{"mix": "shuffled", "implementation": "stock", "error": "out of memory"}, row("ours", 50.0, "shuffled")]
    steps = {"bucketed, fp8 none": row("", 80.0, flops=46.0), "bucketed, fp8 gemm": row("", 88.0)}
    result = {"clock": "CUDA events", "peak_flops_per_second": 100.0, "encoders": rows, "steps": steps}
    found = {goal["goal"]: (goal["measured"], goal["met"]) for goal in step_goals.of_train_step(result)}
    assert found == {
        "encoder, bucketed: ours against stock NeMo": (1.6, True),
        "encoder, bucketed: share of the bfloat16 peak": (0.44, False),
        "encoder, bucketed: fp8 gemm against bfloat16": (1.25, True),
        "encoder, shuffled: share of the bfloat16 peak": (0.01, False),
        "full step, bucketed: share of the bfloat16 peak": (0.46, True),
        "full step, bucketed: fp8 gemm against bfloat16": (1.1, False),
    }
    (cpu,) = step_goals.of_train_step({**result, "clock": "processor time, one thread"})[:1]
    assert (cpu["wanted"], cpu["met"]) == (1.2, True)
    losses = step_goals.of_losses({"runs": {"none": {}, "gemm": {"difference": 0.02}}}, 0.01)
    assert [(goal["measured"], goal["met"]) for goal in losses] == [(0.02, False)]
    assert len(step_goals.lines(losses)) == 1
