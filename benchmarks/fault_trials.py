"""One trial of ``faults.py``: a run to hurt, what was done and saved then, and whether what resumes is exact."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fault_bench import SAVE_EVERY, STEPS, Attempt, checkpoints, config, difference, make_corpus, start

AUDIO_FILES = 18
"""Of the training manifest; each is read within the 16 steps."""


@dataclass
class Outcome:
    """A trial.

    Attributes:
        detail: what was done to the run, as drawn.
        done, saved, resumed: the last step in metrics.csv when the fault struck; the newest finished checkpoint then;
            the step that the next start went on from.
        may_lose: steps that may have to be done again: those since a checkpoint.
        wrong: how a promise was broken; empty if none was.
        note: what the program said or did.
        commit: of the code that was hurt.
    """

    trial: int
    fault: str
    seed: int
    detail: str = ""
    done: int = 0
    saved: int = 0
    resumed: int = 0
    may_lose: int = SAVE_EVERY
    wrong: str = ""
    note: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    commit: str = ""

    @property
    def lost(self) -> int:
        """Steps that had to be done again."""
        return max(0, self.done - self.resumed)


class CannotRun(Exception):
    """This machine does not allow the fault; the message says what it lacks."""


class Trial:
    """One run to hurt: its folder, its random numbers, and the undisturbed run that it must equal."""

    def __init__(self, lab: Lab, number: int, fault: str):
        self.lab, self.outcome = lab, Outcome(number, fault, lab.seed)
        self.rng = np.random.default_rng([lab.seed, number])
        self.runs = lab.folder / f"trial_{number:03d}"
        self.runs.mkdir()
        self.attempts = 0

    def start(
        self,
        prepare: Callable[[int], None] | None = None,
        ranks: int = 1,
        corpus: Path | None = None,
        overrides: Sequence[str] = (),
    ) -> Attempt:
        cfg = config(corpus or self.lab.corpus, self.runs, "run", *parallel(ranks), *overrides)
        self.attempts += 1
        return start(cfg, self.runs.with_suffix(f".{self.attempts}.log"), prepare, ranks, free_port())

    def note_state(self, attempt: Attempt) -> None:
        """What had been done and saved when the fault struck."""
        self.outcome.done = attempt.steps
        self.outcome.saved = max((step for step, _ in checkpoints(attempt.folder)), default=0)

    def moment(self, attempt: Attempt, first: int = 0) -> int:
        """Wait until a step drawn at random is done, and a little more."""
        step = int(self.rng.integers(first, STEPS))
        pause = float(self.rng.uniform(0, 0.3))
        attempt.wait(lambda: attempt.steps >= step)
        time.sleep(pause)
        return step

    def killed(self, what: str = "killed", first: int = 0, **options: Any) -> Attempt:
        """A run that SIGKILL ended at a random moment; its state is noted."""
        attempt = self.start(**options)
        self.outcome.detail = f"{what} after step {self.moment(attempt, first)}"
        attempt.kill()
        attempt.finish()
        self.note_state(attempt)
        return attempt

    def broken(self, how: str) -> None:
        """Note a broken promise; the first one counts."""
        self.outcome.wrong = self.outcome.wrong or how

    def resume(self, reference: Path, expected: int | None = None, **options: Any) -> None:
        """Start again: it must go on from what was saved (or ``expected``), end, and equal the undisturbed run."""
        expected = self.outcome.saved if expected is None else expected
        attempt = self.start(**options)
        statuses = attempt.finish()
        self.outcome.resumed = attempt.resumed_from
        if any(statuses):
            self.broken(f"did not resume: status {statuses}; {last_line(attempt.log)}")
        elif attempt.resumed_from < expected:
            self.broken(f"resumed from step {attempt.resumed_from}, but step {expected} was saved")
        elif self.outcome.lost > self.outcome.may_lose:
            self.broken(f"{self.outcome.lost} steps lost, {self.outcome.may_lose} at most")
        else:
            self.broken(difference(attempt.folder, reference))

    def remove(self) -> None:
        for path in self.runs.parent.glob(f"{self.runs.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Lab:
    """The corpus, and the undisturbed runs, each made when a trial first asks for it."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.corpus = folder, seed, folder / "corpus"
        make_corpus(self.corpus)

    def reference(
        self,
        name: str = "plain",
        prepare: Callable[[int], None] | None = None,
        ranks: int = 1,
        corpus: Path | None = None,
    ) -> Path:
        """The folder of a run that nothing disturbs; ``name`` tells those with different arguments apart."""
        folder = self.folder / f"reference_{name}"
        if not folder.is_dir():
            cfg = config(corpus or self.corpus, self.folder, folder.name, *parallel(ranks))
            log = folder.with_suffix(".log")
            statuses = start(cfg, log, prepare, ranks, free_port()).finish()
            if any(statuses):
                raise RuntimeError(f"an undisturbed run ended with status {statuses}: {last_line(log)}; see {log}")
        return folder


def parallel(ranks: int) -> list[str]:
    return ["trainer.devices=2", "parallel.timeout_seconds=120"] if ranks > 1 else []


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "(nothing said)"
