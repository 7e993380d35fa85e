"""Experiments as commands of this project: each is run once, resumes, and leaves a note of its time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
NOTE_EVERY = 20.0
"""Seconds: as much of a command's time is lost when the experiment is killed."""


@dataclass(frozen=True)
class Step:
    """One command. ``output`` is there when it is done; ``arguments`` follow the script's name.

    Attributes:
        wrapper: a script of this project that runs the script, and its own arguments.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    output: Path
    wrapper: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        return shlex.join(["python", *self.wrapper, f"scripts/{self.script}", *self.arguments])

    @property
    def command(self) -> list[str]:
        wrapper = [str(ROOT / self.wrapper[0]), *self.wrapper[1:]] if self.wrapper else []
        return [sys.executable, *wrapper, str(SCRIPTS / self.script), *self.arguments]


def note_file(step: Step, folder: Path) -> Path:
    return folder / "state" / f"{step.name.replace(': ', '-').replace(' ', '-')}.json"


def seconds(steps: Iterable[Step], folder: Path) -> dict[str, float]:
    """What each command took, over all attempts."""
    return {step.name: json.loads(note_file(step, folder).read_text())["seconds"] for step in steps}


def commits(steps: Iterable[Step]) -> list[str]:
    """Those that the runs among these were made at."""
    runs = [step.output.parent for step in steps if step.output.suffix == ".nemo"]
    return sorted({json.loads((run / "environment.json").read_text())["commit"] for run in runs})


@contextlib.contextmanager
def turn(step: Step, folder: Path) -> Iterator[int]:
    """Wait until no other process runs the step in this folder.

    The lock is an open file's, and the system releases it when the last process that has the file open ends. The
    command gets the file too: where the experiment alone is killed, the step is free when the command has ended.
    """
    path = note_file(step, folder).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{step.name}: another process runs it in {folder}; waiting for its end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def run(step: Step, folder: Path) -> None:
    """Run a command unless it is done, one process at a time, and note what it takes, over all attempts.

    Exits where the command fails, or its output is there but came of another command.
    """
    with turn(step, folder) as lock:
        _run(step, folder, lock)


def _run(step: Step, folder: Path, lock: int) -> None:
    file, experiment = note_file(step, folder), Path(sys.argv[0]).stem
    note: dict[str, Any] = {"command": step.shown, "seconds": 0.0, "done": False}
    if file.is_file():
        note = json.loads(file.read_text())
    if note["command"] != step.shown:
        sys.exit(
            f"{experiment}: {step.name} was begun with other settings:\n  {note['command']}\nGive another --folder"
        )
    if note["done"] and step.output.is_file():
        return
    print(f"\n$ {step.shown}", flush=True)
    before, started, status = note["seconds"], time.perf_counter(), None
    with subprocess.Popen(step.command, pass_fds=[lock]) as process:
        while status is None:
            try:
                status = process.wait(NOTE_EVERY)
            except subprocess.TimeoutExpired:
                status = None
            note["seconds"] = before + time.perf_counter() - started
            note["done"] = status == 0 and step.output.is_file()
            part = file.with_suffix(".part")
            part.write_text(json.dumps(note, indent=1) + "\n")
            os.replace(part, file)  # a kill leaves the old note or the new one
    if not note["done"]:
        sys.exit(f"{experiment}: {step.name} ended with status {status}; the same command again goes on from here")
