"""Hurts training runs and checks the promise: finished work is never lost, and what resumes is exact.

    python benchmarks/faults.py                             # 60 trials; the same command goes on where it stopped
    python benchmarks/faults.py --trials 5 --only kill_9

Each trial starts a very small run (16 steps, a checkpoint every 4) in a process of its own, hurts it at a moment drawn
from (seed, trial), starts it again as a user would, and compares the end with an undisturbed run: weights bit for bit
and every row of metrics.csv. A line a trial goes to --out; the table comes last. The exit status is 1 if a promise was
broken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fault_bench import (
    SAVE_EVERY,
    STEPS,
    Attempt,
    checkpoints,
    config,
    copy_corpus,
    difference,
    make_corpus,
    rows,
    start,
)


@dataclass
class Outcome:
    """A trial.

    Attributes:
        done, saved, resumed: the last step in metrics.csv when the fault struck; the newest finished checkpoint then;
            the step that the next start went on from.
        wrong: how a promise was broken; empty if none was.
        note: what the program said or did.
    """

    trial: int
    fault: str
    detail: str = ""
    done: int = 0
    saved: int = 0
    resumed: int = 0
    wrong: str = ""
    note: str = ""
    seconds: float = 0.0

    @property
    def lost(self) -> int:
        """Steps that had to be done again."""
        return max(0, self.done - self.resumed)


class Trial:
    """One run to hurt: its folder, its random numbers, and the undisturbed run that it must equal."""

    def __init__(self, lab: Lab, number: int, fault: str):
        self.lab, self.outcome = lab, Outcome(number, fault)
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
        parallel = ["trainer.devices=2", "parallel.timeout_seconds=120"] if ranks > 1 else []
        cfg = config(corpus or self.lab.corpus, self.runs, "run", *parallel, *overrides)
        self.attempts += 1
        return start(cfg, self.runs / f"attempt_{self.attempts}.log", prepare, ranks, free_port())

    def note_state(self, attempt: Attempt) -> None:
        """What had been done and saved when the fault struck."""
        self.outcome.done = attempt.steps
        self.outcome.saved = max((step for step, _ in checkpoints(attempt.folder)), default=0)

    def moment(self, attempt: Attempt, first: int = 0) -> int:
        """Wait until a step drawn at random is done, and a little more."""
        step = int(self.rng.integers(first, STEPS))
        attempt.wait(lambda: attempt.steps >= step)
        time.sleep(float(self.rng.uniform(0, 0.3)))
        return step

    def resume(self, reference: Path, expected: int | None = None, **options: Any) -> None:
        """Start again: it must go on from what was saved (or ``expected``), end, and equal the undisturbed run."""
        expected = self.outcome.saved if expected is None else expected
        attempt = self.start(**options)
        statuses = attempt.finish()
        self.outcome.resumed = attempt.resumed_from
        if any(statuses):
            self.outcome.wrong = f"did not resume: status {statuses}; {last_line(attempt.log)}"
        elif attempt.resumed_from < expected:
            self.outcome.wrong = f"resumed from step {attempt.resumed_from}, but step {expected} was saved"
        else:
            self.outcome.wrong = difference(attempt.folder, reference)

    # ---- faults ------------------------------------------------------------------------------------

    def kill_9(self) -> None:
        attempt = self.start()
        self.outcome.detail = f"after step {self.moment(attempt)}"
        attempt.kill()
        attempt.finish()
        self.note_state(attempt)
        self.resume(self.lab.reference())

    def sigterm(self) -> None:
        attempt = self.start()
        self.outcome.detail = f"after step {self.moment(attempt, first=1)}"
        attempt.kill(signal.SIGTERM)
        statuses = attempt.finish()
        self.note_state(attempt)
        self.outcome.note = f"status {statuses[0]}"
        if statuses[0] not in (0, 128 + signal.SIGTERM):
            self.outcome.wrong = f"SIGTERM ended it with status {statuses[0]}"
        elif self.outcome.saved < self.outcome.done:
            self.outcome.wrong = f"SIGTERM at step {self.outcome.done} saved step {self.outcome.saved}"
        else:
            self.resume(self.lab.reference())

    def disk_full(self) -> None:
        """Killed, then started where no file can grow to a checkpoint's size, then with room again."""
        attempt = self.start()
        self.outcome.detail = f"after step {self.moment(attempt)}"
        attempt.kill()
        attempt.finish()
        self.note_state(attempt)
        size = checkpoints(self.lab.reference())[-1][1].stat().st_size

        def no_room(rank: int) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

        # The limit would also stop a loader worker from sharing memory, which a full disk does not.
        full = self.start(no_room, overrides=["data.num_workers=0"])
        statuses = full.finish()
        self.outcome.note = f"status {statuses[0]}: {last_line(full.log)}"
        if statuses[0] == -signal.SIGKILL:
            self.outcome.wrong = "hung without room for a checkpoint"
        elif statuses[0] == 0 and self.outcome.saved < STEPS:
            self.outcome.wrong = "ended well without room for a checkpoint"
        else:
            self.resume(self.lab.reference())

    def corrupt_checkpoint(self) -> None:
        """The newest checkpoint is cut short, or bytes in it change. Then an error that names it, or an exact end."""
        attempt = self.start()
        self.moment(attempt, first=2 * SAVE_EVERY)
        attempt.kill()
        attempt.finish()
        self.note_state(attempt)
        (before, _), (_, newest) = checkpoints(attempt.folder)[-2:]
        content = bytearray(newest.read_bytes())
        if self.rng.random() < 0.5:
            self.outcome.detail = f"{newest.name} cut short"
            content = content[: int(self.rng.integers(0, len(content)))]
        else:
            self.outcome.detail = f"64 bytes of {newest.name} changed"
            for place in self.rng.integers(0, len(content), 64):
                content[place] ^= int(self.rng.integers(1, 256))
        newest.write_bytes(content)
        second = self.start()
        statuses = second.finish()
        if statuses[0] == 0:
            self.outcome.resumed = second.resumed_from
            self.outcome.wrong = difference(second.folder, self.lab.reference())
            return
        said = second.log.read_text(errors="replace")
        self.outcome.note = f"refused: {last_line(second.log)}"
        if newest.name not in said:
            self.outcome.wrong = "the error does not name the checkpoint"
            return
        newest.unlink(missing_ok=True)
        self.resume(self.lab.reference(), expected=before)

    def bad_data(self) -> None:
        """An audio file turns to rubbish, or vanishes, while the run reads: it ends, and lists the row."""
        corpus = copy_corpus(self.lab.corpus, self.runs / "corpus")
        attempt = self.start(corpus=corpus)
        step = self.moment(attempt)
        victim = corpus / f"{int(self.rng.integers(0, 18))}.wav"
        vanish = self.rng.random() < 0.5
        victim.unlink() if vanish else victim.write_bytes(self.rng.bytes(1000))
        self.outcome.detail = f"{victim.name} {'vanished' if vanish else 'corrupted'} after step {step}"
        self.note_state(attempt)
        statuses = attempt.finish()
        listed = (
            (attempt.folder / "bad_rows.jsonl").read_text() if (attempt.folder / "bad_rows.jsonl").is_file() else ""
        )
        self.outcome.resumed, self.outcome.note = self.outcome.done, f"listed: {listed.count(chr(10))} rows"
        losses = [float(row["loss"]) for row in rows(attempt.folder) if row.get("loss")]
        if statuses[0] or len(losses) != STEPS or not np.isfinite(losses).all():
            self.outcome.wrong = f"status {statuses[0]}, {len(losses)} finite steps; {last_line(attempt.log)}"
        elif listed and victim.name not in listed:
            self.outcome.wrong = f"bad_rows.jsonl does not name {victim.name}"

    def nan_gradient(self) -> None:
        """A step whose loss is not a number is skipped; killed about there, the run resumes as if it had not been."""
        step = int(self.rng.integers(1, STEPS))
        reference = self.lab.reference(nan_at=step)
        attempt = self.start(nan_at(step))
        self.outcome.detail = f"NaN in step {step}, killed after step {self.moment(attempt)}"
        attempt.kill()
        attempt.finish()
        self.note_state(attempt)
        self.resume(reference, prepare=nan_at(step))
        skipped = (self.runs / "run" / "skipped_steps.jsonl").read_text().splitlines()
        if not self.outcome.wrong and [json.loads(line)["step"] for line in skipped] != [step]:
            self.outcome.wrong = f"skipped_steps.jsonl has {len(skipped)} lines for step {step}"

    def hanging_worker(self) -> None:
        """A loader worker sleeps for ever; the run is killed, workers and all, and started again."""
        step = int(self.rng.integers(3, STEPS))

        def hang(rank: int) -> None:
            from nemo_slam.data.loader import StepDataset

            read = StepDataset.__getitem__

            def slow(self: StepDataset, number: int) -> Any:
                if number == step:
                    time.sleep(36_000)
                return read(self, number)

            StepDataset.__getitem__ = slow  # type: ignore[method-assign]

        attempt = self.start(hang)
        attempt.wait(lambda: attempt.steps >= 1)
        stuck = not attempt.wait(patience=30)  # the worker is some batches ahead: where the run stops is not known
        attempt.kill()
        attempt.finish()
        self.note_state(attempt)
        self.outcome.detail = f"hangs at batch {step}"
        self.outcome.note = "stood still" if stuck else "did not hang: this trial shows nothing"
        self.resume(self.lab.reference())

    def lost_rank(self) -> None:
        """One of two processes is killed: the other ends by itself, and both start again."""
        reference = self.lab.reference(ranks=2)
        attempt = self.start(ranks=2)
        victim = int(self.rng.integers(0, 2))
        self.outcome.detail = f"rank {victim} after step {self.moment(attempt, first=1)}"
        if attempt.pids[victim] in attempt.alive():
            os.killpg(attempt.pids[victim], signal.SIGKILL)
        statuses = attempt.finish()
        self.note_state(attempt)
        hung = statuses[1 - victim] == -signal.SIGKILL
        self.outcome.note = (
            "the other hung and had to be killed" if hung else f"the other: status {statuses[1 - victim]}"
        )
        self.resume(reference, ranks=2)


FAULTS = (
    "kill_9",
    "sigterm",
    "disk_full",
    "corrupt_checkpoint",
    "bad_data",
    "nan_gradient",
    "hanging_worker",
    "lost_rank",
)


def nan_at(step: int) -> Callable[[int], None]:
    """Plants a loss that is not a number in one optimizer step."""

    def prepare(rank: int) -> None:
        from nemo_slam.models.pretraining import SLAMPretrainingModel

        training_step = SLAMPretrainingModel.training_step

        def broken(self: SLAMPretrainingModel, batch: Any, batch_idx: int) -> Any:
            loss = training_step(self, batch, batch_idx)
            trainer: Any = self.trainer
            return loss * float("nan") if trainer.global_step + 1 == step else loss

        SLAMPretrainingModel.training_step = broken  # type: ignore[method-assign]

    return prepare


class Lab:
    """The corpus, and the undisturbed runs, each made when a trial first asks for it."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.corpus = folder, seed, folder / "corpus"
        make_corpus(self.corpus)

    def reference(self, ranks: int = 1, nan_at: int | None = None) -> Path:
        name = f"reference_{ranks}_{nan_at or 0}"
        folder = self.folder / name
        if not folder.is_dir():
            overrides = ["trainer.devices=2", "parallel.timeout_seconds=120"] if ranks > 1 else []
            cfg, log = config(self.corpus, self.folder, name, *overrides), self.folder / f"{name}.log"
            statuses = start(cfg, log, globals()["nan_at"](nan_at) if nan_at else None, ranks, free_port()).finish()
            if any(statuses):
                raise RuntimeError(f"an undisturbed run ended with status {statuses}: {last_line(log)}; see {log}")
        return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "(nothing said)"


def table(outcomes: list[Outcome]) -> str:
    lines = [
        "| fault | trials | steps done again, most | longest that a checkpoint allows | wrong |",
        "|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        own = [outcome for outcome in outcomes if outcome.fault == fault]
        if own:
            most = max(outcome.lost for outcome in own)
            wrong = sum(bool(outcome.wrong) for outcome in own)
            lines.append(f"| {fault} | {len(own)} | {most} | {SAVE_EVERY} | {wrong} |")
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    return "\n".join([*lines, f"\n{len(outcomes)} trials, {wrong} broken promises"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all, in turn")
    parser.add_argument("--out", type=Path, default=Path("runs/faults.jsonl"), help="default: %(default)s")
    options = parser.parse_args()

    import torch

    import nemo_slam.training.pretrain  # noqa: F401  imported once: each process is a fork of this one

    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.is_file() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        lab = Lab(Path(folder), options.seed)
        for number in range(options.trials):
            if any(outcome.trial == number for outcome in outcomes):
                continue
            trial = Trial(lab, number, options.only[number % len(options.only)])
            began = time.perf_counter()
            getattr(trial, trial.outcome.fault)()
            trial.outcome.seconds = round(time.perf_counter() - began, 1)
            outcomes.append(trial.outcome)
            with options.out.open("a") as file:
                file.write(json.dumps(asdict(trial.outcome)) + "\n")
            print(
                f"{number:3d} {trial.outcome.fault}: {trial.outcome.wrong or 'kept'}; {trial.outcome.detail}",
                flush=True,
            )
            if not trial.outcome.wrong:  # what went wrong stays to be looked at, beside the results
                shutil.rmtree(trial.runs)
            else:
                shutil.copytree(trial.runs, options.out.with_suffix("") / trial.runs.name, dirs_exist_ok=True)
    print(table(outcomes))
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
