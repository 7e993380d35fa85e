"""The benchmark of killed sharding at a small size: kills, comparison, damage; and that a difference shows."""

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import shard_kills
from shard_kills import digests

ROOT = Path(__file__).resolve().parents[2]


def test_small(tmp_path):
    out = tmp_path / "result.json"
    # Of this seed both moments are in the first hundredth of the work, so that each kill strikes.
    sizes = ["--utterances", "300", "--shards", "3", "--kills", "2", "--workers", "1", "--seed", "12888"]
    sizes += ["--out", str(out)]
    command = [sys.executable, "benchmarks/shard_kills.py", *sizes]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    found = json.loads(out.read_text())
    assert found["files_compared"] == 3 * 3 + 3  # tars, indexes, manifests; the manifest of all, the plan, the summary
    assert len(found["kills"]) == 2
    assert all(kill["finished_tars"] < 3 for kill in found["kills"])
    assert (found["differing_files"], found["missed_damage"], found["verified"]) == ([], [], True)
    assert found["commit"]


def test_a_difference_shows(tmp_path):
    (tmp_path / "sharded_manifests").mkdir()
    (tmp_path / "sharded_manifests/manifest_0.json").write_text("a")
    (tmp_path / ".lock").touch()
    before = digests(tmp_path)
    assert list(before) == ["sharded_manifests/manifest_0.json"]
    (tmp_path / "sharded_manifests/manifest_0.json").write_text("b")
    assert digests(tmp_path) != before


def test_writing_that_no_look_saw_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_kills, "SCRIPT", [sys.executable, "-c", ""])  # ends before a first file
    args = Namespace(utterances=1, shards=1, workers=1, kills=1, seed=0)
    assert shard_kills.shard(tmp_path / "manifest.json", tmp_path / "out", args, math.inf) == (False, None)
    with pytest.raises(RuntimeError, match=r"no file was seen being written.*--utterances"):
        shard_kills.measure(tmp_path, args)
