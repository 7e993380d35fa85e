"""The demonstration says what became of the run that it means to kill."""

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("demo", Path(__file__).resolve().parents[2] / "scripts" / "demo.py")
assert SPEC is not None
assert SPEC.loader is not None
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("pass", "ended before it could be killed; the same command again:"),
        ("import pathlib, time; pathlib.Path('a.ckpt').touch(); time.sleep(99)", "killed (SIGKILL); the same command"),
    ],
)
def test_it_is_killed_once_it_has_saved(tmp_path, monkeypatch, capsys, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "command", lambda *_: [sys.executable, "-c", code])
    demo.run_and_kill("x.py", tmp_path)
    assert said in capsys.readouterr().out


def test_a_run_that_fails_before_ends_the_demonstration(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match=r"demo: x\.py ended with status 3; mend what it says above"):
        demo.run_and_kill("x.py", tmp_path)
