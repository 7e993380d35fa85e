"""The benchmark on a machine without a GPU: it says so, its smoke run works, red operators show no speed-up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))
import benchmark
import counts
import goals

FOLDER = Path(benchmark.__file__).parent


def run(*arguments: str, script: str = "benchmark.py") -> str:
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["benchmark.py", "sweep.py"])
def test_says_that_there_is_no_gpu(script, tmp_path):
    arguments = ["--out", str(tmp_path / "r.json")] if script == "benchmark.py" else []
    assert "Nothing measured: no CUDA device" in run(*arguments, script=script)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_smoke_run_times_every_operator_and_shows_no_speed_up(tmp_path):
    out = tmp_path / "r.json"
    printed = run("--smoke", "--out", str(out))
    assert "These times mean nothing" in printed
    assert "as fast" not in printed
    result = json.loads(out.read_text())
    assert {"device", "torch", "triton", "commit", "copy_bytes_per_second", "time"} <= set(result)
    operators = {row["operator"].split(" (")[0] for row in result["rows"]}
    assert operators == {
        "glu_conv_group_norm_silu", "convolution module", "sample_spans", "apply_spans", "corrupt_tokens",
        "sample_distractors", "gumbel_noise", "span_contrastive", "masked_cross_entropy",
    }  # fmt: skip
    with_backward = {row["operator"] for row in result["rows"] if "both" in row}
    assert {"glu_conv_group_norm_silu", "convolution module", "span_contrastive"} <= with_backward


def test_speed_ups_need_green_tests(capsys):
    measured = {"median_ms": 1.0, "peak_bytes": 0}
    rows = [
        {
            "operator": "span_contrastive",
            "mix": "m",
            "implementation": name,
            "forward": measured,
            "forward_limit_ms": 0.5,
        }
        for name in ("triton", "gathered")
    ]
    for failing, shown in (
        (set(), True),
        ({"span_contrastive_accuracy[x]"}, False),
        ({"sample_spans_x"}, True),
        (None, False),
    ):
        benchmark.show(rows, failing)
        assert ("as fast" in capsys.readouterr().out) == shown
    assert benchmark.is_red("convolution module", {"glu_conv_group_norm_silu_accuracy"})
    assert benchmark.is_red("apply_spans (random)", {"apply_spans_gradients"})


def test_counts_of_the_papers_shape():
    # B16 T1600 C1024 bf16: a unit is 52.4 MB; 5 and 13 of them, plus a few per cent of partial sums.
    forward, backward = counts.convolution(16 * 1600, 1024, 5, 2)
    unit = 16 * 1600 * 1024 * 2
    assert unit == 52_428_800
    assert 5 <= forward.memory / unit < 5.3
    assert 13 <= (forward.memory + backward.memory) / unit < 13.9
    assert counts.seconds((forward, backward)) == pytest.approx((forward.memory + backward.memory) / 3.0e12)
    assert counts.contrastive(16_384, 1024, 100, 2)[0].cache == pytest.approx(16_384 * 1024 * 100 * 2)


def test_the_readme_has_the_table_as_counted():
    """Every row of it, beside what is measured; and a shape by hand, since the table is our own output."""
    readme = (FOLDER.parent / "README.md").read_text()
    for line in counts.table():
        assert line in readme, f"kernels/README.md lacks this row of kernels/benchmarks/counts.py: {line}"
    unit = 16 * 1600 * 1024 * 2
    stock = counts.stock_convolution(16 * 1600, 1024, 2, compiled=False)
    assert counts.seconds(stock) == pytest.approx(31 * unit / 3.0e12)
    forward, backward = counts.cross_entropy(4096, 1024, 32_000, 2)
    assert counts.seconds((backward,)) == pytest.approx(3 * 2 * 4096 * 1024 * 32_000 / 800e12)  # bound by its products
    assert forward.seconds() > 2 * 4096 * 1024 * 32_000 / 800e12  # bound by memory


def test_goals_stand_beside_what_was_measured():
    def row(operator, mix, implementation, milliseconds, peak=0):
        timed = {"median_ms": milliseconds, "peak_bytes": peak}
        found = {"operator": operator, "mix": mix, "implementation": implementation, "forward": timed, "both": timed}
        return {**found, "forward_limit_ms": 0.09, "both_limit_ms": 0.24}

    name, mix = "glu_conv_group_norm_silu", "B16 T1600"
    rows = [row(name, mix, "triton", 0.3), row(name, mix, "stock padded", 0.75)]
    rows += [row("span_contrastive", "M16384 D1024 K100", "triton", 2.0, 2**29)]
    found = {r["goal"]: r for r in goals.of_kernels({"rows": rows, "failing_tests": []})}
    measured = {text.removeprefix(f"{name}, {mix}, "): (r["measured"], r["met"]) for text, r in found.items()}
    assert measured["forward: of the copy bandwidth"] == (pytest.approx(0.3), False)
    assert measured["both: of the copy bandwidth"] == (pytest.approx(0.8), True)
    assert measured["both: against stock padded"] == (pytest.approx(2.5), True)
    assert measured["both: against stock padded compiled"] == (None, None)
    assert found["span_contrastive, M16384 D1024 K100, both: memory"]["met"]
    assert found["span_contrastive, M16384 D1024 K100, both: memory"]["measured"] == 0.5
    assert len(goals.lines(list(found.values()))) == len(found) == 6
    for failing in (None, [f"{name}_accuracy[x]", "span_contrastive_accuracy[y]"]):
        assert all(r["met"] is None for r in goals.of_kernels({"rows": rows, "failing_tests": failing}))


def test_a_finished_report_of_the_gpu_tests_is_read(tmp_path):
    report = tmp_path / "tests.xml"
    case = '<testcase classname="tests.gpu.{}" name="test_{}">{}</testcase>'
    names = re.findall(r"^def test_(\w+)", benchmark.TESTS.read_text(), re.MULTILINE)
    assert "gumbel_noise_has_the_bits_of_the_cpu" in names
    cases = [case.format("test_kernels_gpu", f"{name}[1]", "") for name in names]
    cases.append(case.format("test_kernels_gpu", "apply_spans_x", "<failure/>"))
    cases.append(case.format("test_attention_gpu", "z", "<failure/>"))
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert benchmark.failing_operators(report) == {"apply_spans_x"}
    cases = [text for text in cases if "gumbel_noise" not in text]  # a run that was cut before it
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    found = benchmark.failing_operators(report)
    assert benchmark.is_red("gumbel_noise", found)
    assert not benchmark.is_red("span_contrastive", found)
    assert benchmark.failing_operators(tmp_path / "none.xml") is None


def test_gradients_are_in_the_memory_of_a_call():
    """What is held before a call counts as its inputs."""
    x = torch.ones(3, requires_grad=True)
    seen = []
    x.register_hook(seen.append)
    for _ in range(2):
        benchmark._both(lambda: x * 2, [x], torch.ones(3))
        assert x.grad is None
    assert [grad.tolist() for grad in seen] == [[2.0] * 3] * 2
