"""The runner: a script sees what it would see from Python itself, with our classes allowed."""

import subprocess
import sys
import textwrap

import pytest


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "nemo_slam.runner", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "folder" / "script.py"
        path.parent.mkdir()
        (path.parent / "neighbour.py").write_text("VALUE = 7\n")
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_script_gets_its_arguments_its_folder_and_its_name(script):
    path = script("""
        import sys
        import neighbour
        print(__name__, sys.argv, neighbour.VALUE, __file__)
    """)
    done = run(path, "a=1", "--flag")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"__main__ {[str(path), 'a=1', '--flag']} 7 {path}"


def test_our_prefix_is_registered_and_no_nemo_is_imported_for_it(script):
    path = script("""
        import sys
        assert "nemo" not in sys.modules
        from nemo_slam.allowlist import MODULE, _Finder
        assert any(isinstance(finder, _Finder) for finder in sys.meta_path)
    """)
    done = run(path)
    assert done.returncode == 0, done.stderr


def test_exit_status_and_errors_are_the_scripts_own(script):
    done = run(script("raise SystemExit(5)"))
    assert done.returncode == 5


@pytest.mark.parametrize(("arguments", "status"), [(["none.py"], 2), ([], 2), (["--help"], 0)])
def test_usage(arguments, status):
    done = run(*arguments)
    assert done.returncode == status
    assert "none.py is not a file" in done.stderr if arguments == ["none.py"] else "nemo_slam.runner" in done.stdout
