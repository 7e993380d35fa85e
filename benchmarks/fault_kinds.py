"""What ``faults.py`` does to a run: a function a fault. Each breaks a promise where it finds one broken."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fault_bench import SAVE_EVERY, STEPS, checkpoints, copy_corpus, difference, rows
from fault_trials import AUDIO_FILES, Trial, last_line
from small_disks import small_disk

_KIB = 1 << 10


def kill_9(trial: Trial) -> None:
    trial.killed()
    trial.resume(trial.lab.reference())


def sigterm(trial: Trial) -> None:
    """It saves, ends with the status of a terminated process, and loses nothing."""
    attempt = trial.start()
    trial.outcome.detail = f"after step {trial.moment(attempt, first=1)}"
    attempt.kill(signal.SIGTERM)
    statuses = attempt.finish()
    trial.note_state(attempt)
    trial.outcome.may_lose, trial.outcome.note = 0, f"status {statuses[0]}"
    if statuses[0] not in (0, 128 + signal.SIGTERM):
        trial.broken(f"SIGTERM ended it with status {statuses[0]}")
    elif trial.outcome.saved < trial.outcome.done:
        trial.broken(f"SIGTERM at step {trial.outcome.done} saved step {trial.outcome.saved}")
    trial.resume(trial.lab.reference())


def disk_full(trial: Trial) -> None:
    """Its disk is full, to less than a checkpoint or to the last byte, from some step on; later there is room again."""
    reference = trial.lab.reference()
    size = checkpoints(reference)[-1][1].stat().st_size
    with small_disk(trial.runs, 20 * size):
        attempt = trial.start()
        step = trial.moment(attempt)
        disk = os.statvfs(trial.runs)
        left = int(trial.rng.choice([0, 4 * _KIB, trial.rng.integers(0, size)]))
        with (trial.runs / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, max(1, disk.f_bavail * disk.f_frsize - left))
        trial.outcome.detail = f"{left} bytes left after step {step}"
        statuses = attempt.finish()
        trial.note_state(attempt)
        trial.outcome.note = f"status {statuses[0]}: {last_line(attempt.log)}"
        said = attempt.log.read_text(errors="replace")
        if statuses[0] == -signal.SIGKILL:
            trial.broken("hung on a full disk")
        elif statuses[0] == 0 and not (attempt.folder / "run.nemo").is_file():
            trial.broken("ended well on a full disk without its model")
        elif statuses[0] and not ("Make room" in said and str(trial.runs) in said):
            trial.broken(f"the error does not name the full disk: {last_line(attempt.log)}")
        (trial.runs / "filler").unlink()
        trial.resume(reference)


def shared_memory_full(trial: Trial) -> None:
    """Killed; then loader workers find no room in /dev/shm, which ends the run with a sentence; then they do again."""
    attempt = trial.killed()
    room = int(trial.rng.integers(4, 64)) * _KIB
    trial.outcome.detail += f", then {room >> 10} KiB of /dev/shm"
    began = time.monotonic()
    with small_disk(Path("/dev/shm"), room):
        full = trial.start()
        statuses = full.finish()
    trial.outcome.note = f"status {statuses[0]} after {time.monotonic() - began:.0f} s: {last_line(full.log)}"
    if statuses[0] == -signal.SIGKILL:
        trial.broken("hung without shared memory")
    elif statuses[0] == 0 and trial.outcome.saved < STEPS:
        trial.outcome.note = "there was room enough: this trial shows nothing"
    elif statuses[0] and "data.num_workers" not in full.log.read_text(errors="replace"):
        trial.broken(f"the error names no way out: {last_line(full.log)}")
    trial.outcome.saved = max((step for step, _ in checkpoints(attempt.folder)), default=0)
    trial.resume(trial.lab.reference())


def corrupt_checkpoint(trial: Trial) -> None:
    """The newest checkpoint is cut short, or bytes in it change: an error names it; without it, an exact end."""
    attempt = trial.killed(first=2 * SAVE_EVERY)
    *earlier, (_, newest) = checkpoints(attempt.folder)
    before = earlier[-1][0] if earlier else 0
    content = bytearray(newest.read_bytes())
    kind = str(trial.rng.choice(["cut", "zeros", "bytes", "byte"]))
    if kind == "cut":
        content = content[: int(trial.rng.integers(0, len(content)))]
    elif kind == "zeros":
        at = int(trial.rng.integers(0, len(content)))
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    else:
        for place in trial.rng.integers(0, len(content), 64 if kind == "bytes" else 1):
            content[place] ^= int(trial.rng.integers(1, 256))
    trial.outcome.detail += f", {kind} in {newest.name}"
    trial.outcome.may_lose = 2 * SAVE_EVERY
    unchanged = bytes(content) == newest.read_bytes()
    newest.write_bytes(content)
    second = trial.start()
    statuses = second.finish()
    if statuses[0] == 0:  # where the change is in bytes that mean nothing, such as padding
        trial.outcome.note = "unchanged" if unchanged else "read all the same"
        trial.outcome.resumed = second.resumed_from
        trial.broken(difference(second.folder, trial.lab.reference()))
        return
    trial.outcome.note = f"refused: {last_line(second.log)}"
    said = second.log.read_text(errors="replace")
    if not (newest.name in said and "is damaged" in said):
        trial.broken("the error does not name the damaged checkpoint")
    newest.unlink(missing_ok=True)
    trial.resume(trial.lab.reference(), expected=before)


def corrupt_data(trial: Trial) -> None:
    """An audio file is rubbish, and the run is killed; before it starts again, its indexes are damaged, too."""
    victim = ("3.wav", "11.wav")[int(trial.rng.integers(0, 2))]
    rubbish = np.random.default_rng(AUDIO_FILES).bytes(1000)

    def corpus(name: str) -> Path:
        folder = copy_corpus(trial.lab.corpus, trial.lab.folder / name)
        (folder / victim).write_bytes(rubbish)
        return folder

    damaged = trial.lab.folder / f"damaged_{victim}"
    damaged = damaged if damaged.is_dir() else corpus(damaged.name)
    reference = trial.lab.reference(f"without_{victim}", corpus=damaged)
    own = corpus(f"{trial.runs.name}_corpus")
    attempt = trial.killed(f"{victim} is rubbish, killed", corpus=own)
    indexes = sorted(
        path for path in (own / ".nemo_slam_index").rglob("*") if path.is_file() and path.suffix != ".lock"
    )
    hurt = indexes[int(trial.rng.integers(0, len(indexes)))] if indexes else None
    if hurt is not None:  # a kill before the first step may come before the first index
        content = hurt.read_bytes()
        half = trial.rng.random() < 0.5
        hurt.write_bytes(content[: len(content) // 2] if half else bytes(len(content)))
        trial.outcome.detail += f", {hurt.parent.name.split('-')[0]}/{hurt.name} {'cut in half' if half else 'zeroed'}"
    trial.resume(reference, corpus=own)
    listed = [json.loads(line) for line in (attempt.folder / "bad_rows.jsonl").read_text().splitlines()]
    lines = sorted((row["stream"], row["line"]) for row in listed)
    number = int(victim.split(".")[0]) + 1
    if lines != [("pairs", number), ("speech", number)]:
        trial.broken(f"bad_rows.jsonl lists {lines}, not line {number} of speech and pairs, once each")


def vanishing_data(trial: Trial) -> None:
    """An audio file or the manifest vanishes while the run reads.

    Without audio it ends well and lists the row, and what came before is exact. Without a manifest a killed run says so
    at the next start, and resumes exactly once it is back.
    """
    corpus = copy_corpus(trial.lab.corpus, trial.lab.folder / f"{trial.runs.name}_corpus")
    if trial.rng.random() < 0.5:
        manifest = corpus / "train.json"
        trial.killed("train.json vanished, killed", corpus=corpus)
        aside = manifest.rename(corpus / "aside")
        refused = trial.start(corpus=corpus)
        statuses = refused.finish()
        trial.outcome.note = f"status {statuses[0]}: {last_line(refused.log)}"
        if statuses[0] == 0 or str(manifest) not in refused.log.read_text(errors="replace"):
            trial.broken("the error does not name the manifest")
        aside.rename(manifest)
        trial.resume(trial.lab.reference(), corpus=corpus)
        return
    attempt = trial.start(corpus=corpus)
    step = trial.moment(attempt)
    victim = corpus / f"{int(trial.rng.integers(0, AUDIO_FILES))}.wav"
    victim.unlink()
    trial.outcome.detail = f"{victim.name} vanished after step {step}"
    trial.note_state(attempt)
    statuses = attempt.finish()
    bad = attempt.folder / "bad_rows.jsonl"
    listed = bad.read_text() if bad.is_file() else ""
    trial.outcome.resumed, trial.outcome.note = trial.outcome.done, f"listed: {listed.count(chr(10))} rows"
    found, expected = rows(attempt.folder), rows(trial.lab.reference())
    losses = [float(row["loss"]) for row in found if row.get("loss")]
    if statuses[0] or len(losses) != STEPS or not np.isfinite(losses).all():
        trial.broken(f"status {statuses[0]}, {len(losses)} finite steps; {last_line(attempt.log)}")
    before = [row for row in expected if int(row["step"]) <= trial.outcome.done and row.get("loss")]
    if before != [row for row in found if row.get("loss")][: len(before)]:
        trial.broken("steps before the file vanished differ")
    if not listed and found != expected:
        trial.broken("the run differs, and no row is listed")
    if listed and any(json.loads(line)["line"] != int(victim.stem) + 1 for line in listed.splitlines()):
        trial.broken(f"bad_rows.jsonl lists other rows than that of {victim.name}: {listed}")


def nan_gradient(trial: Trial) -> None:
    """A step whose loss is not a number is skipped; killed about there, the run resumes as if it had not been."""
    step = int(trial.rng.integers(1, STEPS))
    reference = trial.lab.reference(f"nan_{step}", nan_at(step))
    trial.killed(f"NaN in step {step}, killed", prepare=nan_at(step))
    trial.resume(reference, prepare=nan_at(step))
    skipped = [json.loads(line)["step"] for line in (trial.runs / "run/skipped_steps.jsonl").read_text().splitlines()]
    if skipped != [step]:
        trial.broken(f"skipped_steps.jsonl lists {skipped}, not {[step]}")


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


def hanging_worker(trial: Trial) -> None:
    """A loader worker sleeps for ever; the run is killed, workers and all, and started again."""
    batch = int(trial.rng.integers(2, STEPS))
    mark = trial.runs / "asleep"

    def hang(rank: int) -> None:
        from nemo_slam.data.loader import StepDataset

        read = StepDataset.__getitem__

        def asleep(self: StepDataset, number: int) -> Any:
            if number == batch:
                mark.touch()
                time.sleep(36_000)
            return read(self, number)

        StepDataset.__getitem__ = asleep  # type: ignore[method-assign]

    attempt = trial.start(hang)
    # Lightning reads one batch ahead: with batch k missing, k - 1 steps are done.
    attempt.wait(lambda: mark.exists() and attempt.steps >= batch - 1)
    time.sleep(1)
    if not mark.exists() or attempt.steps > batch:
        trial.broken(f"step {attempt.steps} was done while batch {batch} hung")
    attempt.kill()
    attempt.finish()
    trial.note_state(attempt)
    trial.outcome.detail = f"hangs at batch {batch}"
    trial.resume(trial.lab.reference())


def lost_rank(trial: Trial) -> None:
    """One of two processes is killed: the other ends by itself, and both start again."""
    reference = trial.lab.reference("two_ranks", ranks=2)
    attempt = trial.start(ranks=2)
    victim = int(trial.rng.integers(0, 2))
    trial.outcome.detail = f"rank {victim} after step {trial.moment(attempt, first=1)}"
    if attempt.pids[victim] in attempt.alive():
        os.killpg(attempt.pids[victim], signal.SIGKILL)
    statuses = attempt.finish()
    trial.note_state(attempt)
    trial.outcome.note = f"the other: status {statuses[1 - victim]}"
    if statuses[1 - victim] == -signal.SIGKILL:
        trial.broken("the other rank hung")
    trial.resume(reference, ranks=2)


FAULTS: dict[str, Callable[[Trial], None]] = {
    function.__name__: function
    for function in (
        *(kill_9, sigterm, disk_full, shared_memory_full, corrupt_checkpoint),
        *(corrupt_data, vanishing_data, nan_gradient, hanging_worker, lost_rank),
    )
}
