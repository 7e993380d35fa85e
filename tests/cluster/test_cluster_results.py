"""The result file of ``make cluster-test``: whole, or not there."""

from __future__ import annotations

import json

import pytest
from cluster_results import ClusterResults


def test_a_file_is_written_once_every_case_has_passed(tmp_path, capsys):
    results = ClusterResults([("sharded", 2), ("killed", 2)], tmp_path / "new")
    results.passed("killed", 2, "ddp", resumed_bit_for_bit=True)
    assert results.write() is None
    assert "no result file, without sharded (2 machines)" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    results.passed("sharded", 2, "fsdp2", largest_difference={"losses": 1e-7})
    path = results.write()
    assert path is not None
    assert list((tmp_path / "new").iterdir()) == [path]
    found = json.loads(path.read_text())
    assert [case["case"] for case in found["cases"]] == ["sharded", "killed"]
    assert found["cases"][0]["largest_difference"] == {"losses": 1e-7}
    assert found["cases"][1] == {"case": "killed", "nodes": 2, "strategy": "ddp", "resumed_bit_for_bit": True}
    assert {"commit", "torch", "device", "time", "load_at_start", "load_at_end"} <= set(found)


def test_a_case_that_was_not_asked_for(tmp_path):
    with pytest.raises(AssertionError, match="no such case: killed, 4 machines"):
        ClusterResults([("killed", 2)], tmp_path).passed("killed", 4, "ddp")
