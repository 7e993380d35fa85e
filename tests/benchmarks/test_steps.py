"""Commands of an experiment: a stopped one goes on, other settings are refused, time is noted, a wrapper runs it."""

import json
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.fixture
def slow_step(tmp_path):
    """A command that counts its calls and ends when the file `go` is there; a function starts an experiment of it."""
    (tmp_path / "x.py").write_text(
        "import pathlib, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "with (here / 'calls').open('a') as calls:\n"
        "    calls.write('call ')\n"
        "while not (here / 'go').exists():\n"
        "    time.sleep(0.02)\n"
        "(here / 'output').write_text('x')\n"
    )
    experiment = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(steps.__file__).parent)!r})\n"
        f"import steps; here = Path({str(tmp_path)!r}); steps.SCRIPTS = here\n"
        "steps.run(steps.Step('one', 'x.py', (), here / 'output'), here)\n"
    )
    started = []

    def start():
        started.append(subprocess.Popen([sys.executable, "-c", experiment], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    (tmp_path / "go").touch()  # a command whose experiment was killed ends by it
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def line_of(process):
    """Its next line that is not empty."""
    return next(line for line in process.stdout if line.strip())


WAITS = "one: another process runs it in {}; waiting for its end\n"


def test_two_experiments_at_once_run_a_step_once(slow_step, tmp_path):
    first = slow_step()
    assert line_of(first).startswith("$ python scripts/x.py")
    second = slow_step()
    assert line_of(second) == WAITS.format(tmp_path)
    (tmp_path / "go").touch()
    assert first.wait(120) == second.wait(120) == 0
    assert second.stdout.read() == ""
    assert (tmp_path / "calls").read_text() == "call "


def test_a_killed_experiment_leaves_no_lock_but_its_commands(slow_step, tmp_path):
    """A command that goes on without its experiment is waited for; then the step, not noted as done, is run."""
    first = slow_step()
    while not (tmp_path / "calls").exists():  # the line about it is printed before it starts
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    second = slow_step()
    assert line_of(second) == WAITS.format(tmp_path)
    (tmp_path / "go").touch()
    assert second.wait(120) == 0
    assert (tmp_path / "calls").read_text() == "call call "
    assert slow_step().wait(120) == 0
    assert (tmp_path / "calls").read_text() == "call call "
