"""What the fault and soak benchmarks rest on: their lists, their arithmetic, what they see of processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import fault_kinds
import faults
import pytest
import soak
from fault_trials import Outcome
from process_tree import tree, usage

ROOT = Path(__file__).resolve().parents[2]


def test_every_kind_of_fault_has_its_function():
    assert list(fault_kinds.FAULTS) == list(faults.KINDS)
    assert set(faults.KINDS) >= faults.NEED_MOUNTS
    assert 60 % len(faults.KINDS) == 0  # as many trials of each


def test_the_table_counts_lost_steps_and_wrong_resumes():
    outcomes = [
        Outcome(0, "kill_9", 1, done=7, saved=4, resumed=4),
        Outcome(1, "kill_9", 1, done=8, saved=8, resumed=8, wrong="2 of 9 tensors differ"),
        Outcome(2, "sigterm", 1, done=5, saved=5, resumed=5, may_lose=0),
    ]
    rows = faults.summary(outcomes)
    counts = {"trials": 2, "steps_lost": 3, "steps_lost_most": 3, "steps_lost_allowed": 4, "wrong": 1}
    assert rows[0] == {"fault": "kill_9", **counts}
    assert faults.table(rows).splitlines()[2:] == [
        "| kill 9 | 2 | 3 | 4 | 1 |",
        "| sigterm | 1 | 0 | 0 | 0 |",
        "| all | 3 | 3 | | 1 |",
    ]


def test_trials_of_another_choice_of_faults_are_not_counted_on():
    kinds = ["kill_9", "sigterm", "lost_rank"]
    outcomes = [Outcome(0, "kill_9", 1), Outcome(4, "sigterm", 1)]
    assert faults.other_kinds(outcomes, kinds) == ""
    assert faults.other_kinds(outcomes, kinds[:2]).startswith("trial 4 of sigterm")


def test_a_trial_is_repeated_beside_what_the_trials_left(tmp_path, monkeypatch, capsys):
    """--trial runs it again, with the seed of --out; other faults in the same --out are refused."""
    out, ran = tmp_path / "faults.jsonl", []
    line = json.dumps(asdict(Outcome(0, "kill_9", 7))) + "\n"
    out.write_text(line)

    def run_trials(lab, numbers, kinds, outcomes, to):
        ran.append((lab.seed, numbers, list(outcomes), to.name))
        outcomes.append(Outcome(0, "kill_9", lab.seed))

    monkeypatch.setattr(faults, "run_trials", run_trials)
    arguments = ["faults.py", "--out", str(out), "--only", "kill_9"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--trial", "0"])
    assert faults.main() == 0
    assert ran == [(7, [0], [], "faults_trial_0.jsonl")]
    assert out.read_text() == line
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], "lost_rank"])
    with pytest.raises(SystemExit):
        faults.main()
    assert "trial 0 of kill_9, begun with another choice of faults: name another --out" in capsys.readouterr().err
    assert len(ran) == 1


def test_trials_of_other_code_or_long_done_are_not_todays_result(tmp_path, monkeypatch, capsys):
    """A second `make faults` would hurt nothing, and write the old trials down as those of today's commit."""
    from nemo_slam.training import environment

    now = "ba9876543210"
    monkeypatch.setattr(environment, "_commit", lambda: now)
    out, ran = tmp_path / "faults.jsonl", []
    monkeypatch.setattr(faults, "run_trials", lambda lab, numbers, *rest: ran.append(numbers))
    arguments = ["faults.py", "--out", str(out), "--only", "kill_9", "--trials"]
    for commit, trials, said in (
        ("0123456789ab", "2", f"holds trials of commit 0123456789ab, not {now}"),
        (now, "1", "holds all of these trials already: name another --out"),
        (now, "2", None),
    ):
        out.write_text(json.dumps(asdict(Outcome(0, "kill_9", 7, commit=commit))) + "\n")
        monkeypatch.setattr(sys, "argv", [*arguments, trials])
        if said is None:
            assert faults.main() == 0
            continue
        with pytest.raises(SystemExit):
            faults.main()
        assert said in capsys.readouterr().err
    assert ran == [[0, 1]]


def test_a_soak_that_slows_down_and_grows_is_told():
    def sample(second: int) -> dict[str, float]:
        step = 2 * second if second < 50 else 100 + (second - 50)
        return {"seconds": second, "step": step, "cpu_seconds": second / 2, "resident_mib": 90 + second, "threads": 3}

    found = soak.summary([sample(second) for second in range(100)])
    assert found["steps_per_second"] == {"first": 2.0, "last": 1.0, "ratio": 0.5}
    assert found["steps_per_cpu_second"]["ratio"] == 0.5
    assert found["resident_mib"]["growth"] == 60
    assert found["resident_mib"]["per_hour"] == 3600
    assert found["threads"]["growth"] == 0


def test_the_process_tree_is_seen():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while len(tree(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        found = usage(process.pid)
        assert found.processes == 2
        assert found.threads == 2
        assert 8 < found.resident_mib < 200
        assert found.open_files >= 6
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_page_shows_the_results_that_it_names():
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = {kind: re.findall(rf"benchmarks/results/{kind}_[-\w]+\.json", page) for kind in ("faults", "soak")}
    assert [len(found) for found in named.values()] == [1, 1]
    trials = json.loads((ROOT / named["faults"][0]).read_text())
    assert faults.table(trials["faults"]) in page
    assert f"seed {trials['seed']}:" in page
    assert (
        faults.summary([Outcome(**{k: v for k, v in o.items() if k != "lost"}) for o in trials["outcomes"]])
        == (trials["faults"])
    )
    found = json.loads((ROOT / named["soak"][0]).read_text())
    assert soak.table(found) in page
