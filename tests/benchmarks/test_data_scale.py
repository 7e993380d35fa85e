"""The scale benchmark at a small size: it runs, and counts what it generated."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_small(tmp_path):
    result = subprocess.run(
        [sys.executable, "benchmarks/data_scale.py", "--examples", "1200", "--tokens", "20000", "--batches", "30"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    found = json.loads(result.stdout)
    assert found["rows"]["speech"] == 1200
    assert 20_000 <= found["tokens"] < 20_181
    assert 110 < found["rows"]["text"] < 1000
    assert 0 < found["worker_mib"] < 1024
    assert found["within_aims"]["memory"]
    assert found["start_seconds"] > 0
    assert list(tmp_path.iterdir()) == []  # what was generated is removed
