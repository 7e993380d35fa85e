"""The scale benchmark at a small size: it runs, and counts what it generated."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_small(tmp_path):
    generated, out = tmp_path / "generated", tmp_path / "result.json"
    generated.mkdir()
    sizes = ["--examples", "1200", "--tokens", "20000", "--batches", "30"]
    subprocess.run(
        [sys.executable, "benchmarks/data_scale.py", *sizes, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
        env={**os.environ, "TMPDIR": str(generated)},
    )
    found = json.loads(out.read_text())
    assert found["rows"]["speech"] == 1200
    assert 20_000 <= found["tokens"] < 20_181
    assert 110 < found["rows"]["text"] < 1000
    assert 0 < found["worker_mib"] < 1024
    assert found["within_aims"]["memory"]
    assert found["start_seconds"] > 0
    assert found["torch"]
    assert found["commit"]
    assert list(generated.iterdir()) == []  # what was generated is removed
