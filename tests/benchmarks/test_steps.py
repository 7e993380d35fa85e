"""Commands of an experiment: a stopped one goes on, other settings are refused, time is noted, a wrapper runs it."""

import json

import pytest
import steps


def note(step, folder):
    return json.loads(steps.note_file(step, folder).read_text())


def test_a_stopped_study_goes_on_and_refuses_other_settings(tmp_path, monkeypatch):
    """Commands that count their calls; the second fails the first time."""
    monkeypatch.setattr(steps, "SCRIPTS", tmp_path)
    (tmp_path / "x.py").write_text(
        "import pathlib, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "calls = here / 'calls'\n"
        "calls.write_text((calls.read_text() if calls.exists() else '') + sys.argv[1] + ' ')\n"
        "if calls.read_text() != 'one two ':\n"
        "    (here / sys.argv[1]).write_text('x')\n"
    )
    first, second = (steps.Step(n, "x.py", (n,), tmp_path / n) for n in ("one", "two"))
    steps.run(first, tmp_path)
    with pytest.raises(SystemExit, match="two ended with status 0; the same command again"):
        steps.run(second, tmp_path)
    failed = note(second, tmp_path)
    assert not failed["done"]
    steps.run(first, tmp_path)
    steps.run(second, tmp_path)
    assert (tmp_path / "calls").read_text() == "one two two "
    assert note(second, tmp_path)["done"]
    assert note(second, tmp_path)["seconds"] > failed["seconds"] > 0
    with pytest.raises(SystemExit, match="begun with other settings"):
        steps.run(steps.Step("one", "x.py", ("other",), tmp_path / "one"), tmp_path)


def test_time_is_noted_while_a_command_runs(tmp_path, monkeypatch):
    """So that little of it is lost when the study is killed: the command reads its own note."""
    monkeypatch.setattr(steps, "SCRIPTS", tmp_path)
    monkeypatch.setattr(steps, "NOTE_EVERY", 0.02)
    step = steps.Step("one", "x.py", (), tmp_path / "seen.json")
    (tmp_path / "x.py").write_text(
        "import pathlib, time\n"
        f"note = pathlib.Path({str(steps.note_file(step, tmp_path))!r})\n"
        "while not note.exists() or '\"seconds\": 0.0,' in note.read_text():\n"
        "    time.sleep(0.02)\n"
        f"pathlib.Path({str(step.output)!r}).write_text(note.read_text())\n"
    )
    steps.run(step, tmp_path)
    seen = json.loads(step.output.read_text())
    assert not seen["done"]
    assert 0 < seen["seconds"] < note(step, tmp_path)["seconds"]


def test_a_wrapper_runs_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "SCRIPTS", tmp_path / "scripts")
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    seen = str(tmp_path / "seen")
    (tmp_path / "with.py").write_text(f"import json, sys\njson.dump(sys.argv[1:], open({seen!r}, 'w'))")
    step = steps.Step("one", "x.py", ("a b",), tmp_path / "seen", ("with.py", "this"))
    assert step.shown == "python with.py this scripts/x.py 'a b'"
    steps.run(step, tmp_path)
    assert json.loads(step.output.read_text()) == ["this", str(tmp_path / "scripts" / "x.py"), "a b"]
    assert steps.seconds([step], tmp_path)["one"] == note(step, tmp_path)["seconds"] > 0
