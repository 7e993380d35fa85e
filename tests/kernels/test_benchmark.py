"""The benchmark on a machine without a GPU: it says so, its smoke run works, red operators show no speed-up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))
import benchmark
import counts

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
