"""A rank that dies or stops answering is named on all others, and ends them, whatever they wait for.

A message between ranks fails at once only where the lost process closed its connections. A machine without power closes
none, and NCCL waits on: so every rank gives a sign of life in the store where all ranks have met, from a thread of its
own, and rank 0 counts. Its verdict is read by all, each says it and ends.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

COMMUNICATION = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Timed out",
    "TCPStore",
)
"""What errors of a message between ranks say."""

INTERVAL = 2.0
"""Seconds between two signs of life."""
AFTER_ERROR = 10.0
"""Seconds without a sign of life that mean lost, once a message has failed somewhere."""
UNWINDING = 5.0
"""Seconds in which the training thread may end by its own error, before the process is ended."""
EXIT = 10.0
"""Seconds from that error to the end of the process: what it does on its way out may wait for a broken connection."""


class LostRankError(RuntimeError):
    """Other ranks do not answer any more."""


class LostRanks(Callback):
    """Watches over all ranks from the start of training until the block that it is used as is left.

    An error of communication within the block becomes a `LostRankError` that names who is lost. A rank that hangs in a
    message is ended from the outside, with the same words.

    Args:
        lost_after: seconds without a sign of life after which a rank is lost. Longer than any pause of a healthy
            machine; a rank that is merely slow goes on giving signs.
    """

    def __init__(self, lost_after: float):
        self.lost_after = lost_after
        self.verdict: str | None = None
        self._alarm: tuple[str, str] | None = None  # a key of the store, and what this rank saw go wrong
        self._rounds = 0
        self._wake, self._told, self._done = threading.Event(), threading.Event(), threading.Event()
        self._decided, self._unwound = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or not dist.is_initialized() or self._threads:
            return
        self.start(_own_connection(), trainer.global_rank, trainer.world_size)

    def start(self, store: Any, rank: int, world: int) -> None:
        """Begins to give signs and to watch. All ranks call it; ``store`` is used by one thread alone."""
        self._store, self._rank, self._world = store, rank, world
        store.set(f"sign/{rank}", "")
        names: list[Any] = [None] * world
        dist.all_gather_object(names, socket.gethostname())  # from here on there is a sign of everyone
        self._names = [f"rank {other} ({name})" for other, name in enumerate(names)]
        self._silent = [0] * world  # rounds without a new sign
        self._signs = [b""] * world
        self._since_alarm = 0
        for target in (self._give_signs, self._watch):
            thread = threading.Thread(target=target, name=f"lost_ranks.{target.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    # ---- the training thread ---------------------------------------------------------------------

    def __enter__(self) -> LostRanks:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and self._threads and not self._done.is_set():
            lost = isinstance(error, RuntimeError) and any(word in str(error) for word in COMMUNICATION)
            what = f"{self._names[self._rank]}: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:300]}"
            self._alarm = ("alarm" if lost else "ended", what)
            self._wake.set()
            if lost or self._rank == 0:
                self._decided.wait(AFTER_ERROR + 6 * INTERVAL + UNWINDING)
            else:  # the others hear of it, and this rank ends by its own error
                self._told.wait(2 * INTERVAL)
            self._unwound.set()
            self.stop()
            if lost:
                # An interpreter takes seconds to take NeMo's heap apart, a minute on a busy machine, and nobody waits.
                atexit.register(os._exit, 1)
                faulthandler.dump_traceback_later(EXIT, exit=True, file=2)
                raise LostRankError(_sentence(self.verdict or f"no verdict; {what}")) from error
        self.stop()

    def stop(self) -> None:
        """No signs and no watch from here on."""
        self._done.set()
        self._wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=INTERVAL)

    # ---- the thread that talks to the store ------------------------------------------------------

    def _give_signs(self) -> None:
        while not self._done.is_set():
            try:
                verdict = self._round()
            except RuntimeError:  # the store is gone: at the end of a run, or because its machine is
                if self._done.wait(AFTER_ERROR / 2):
                    return
                verdict = self._without_store()
            if verdict is not None:
                self.verdict = verdict
                self._decided.set()
                return
            self._rounds += 1
            self._wake.wait(INTERVAL)
            self._wake.clear()

    def _round(self) -> str | None:
        """One sign of life, and what there is to know."""
        self._store.set(f"sign/{self._rank}", str(self._rounds))
        if self._alarm is not None:
            self._store.compare_set(self._alarm[0], "", self._alarm[1])  # the first counts
            self._told.set()
        if self._rank == 0:
            return self._judge()
        if self._store.check(["verdict"]):
            verdict = self._store.get("verdict").decode()
            self._store.set(f"read/{self._rank}", "")
            return verdict
        self._count([0])
        return self._without_store() if self._silent[0] * INTERVAL > self.lost_after + AFTER_ERROR else None

    def _judge(self) -> str | None:
        """Rank 0: who is lost? Counted in its own rounds, so that a pause of its machine is nobody's fault."""
        others = range(1, self._world)
        self._count(others)
        if self._store.check(["ended"]):
            lost, verdict = [], f"ended by an error of {self._store.get('ended').decode()}"
        else:
            alarm = self._store.get("alarm").decode() if self._store.check(["alarm"]) else ""
            rounds = (AFTER_ERROR if alarm else self.lost_after) / INTERVAL
            self._since_alarm += bool(alarm)
            lost = [other for other in others if self._silent[other] > rounds]
            if not lost and self._since_alarm <= rounds + 1:
                return None
            verdict = f"no answer from {', '.join(self._names[r] for r in lost)}" if lost else "all ranks still run"
            verdict += f"; the first to fail was {alarm}" if alarm else ""
        self._store.set("verdict", verdict)
        # This process, or its torchrun, may be the store: it stays until the others have read.
        readers = [f"read/{other}" for other in others if other not in lost]
        deadline = time.monotonic() + 2 * INTERVAL
        while readers and time.monotonic() < deadline:
            readers = [reader for reader in readers if not self._store.check([reader])]
            time.sleep(0.1)
        return verdict

    def _count(self, ranks: Sequence[int]) -> None:
        """Goes on counting the rounds since each of ``ranks`` gave its last sign."""
        for rank, sign in zip(ranks, self._store.multi_get([f"sign/{rank}" for rank in ranks]), strict=True):
            self._silent[rank] = self._silent[rank] + 1 if sign == self._signs[rank] else 0
            self._signs[rank] = sign

    def _without_store(self) -> str:
        return f"no answer from {self._names[0]}, where all ranks meet"

    # ---- the thread that ends a process that hangs -----------------------------------------------

    def _watch(self) -> None:
        rounds, idle = -1, 0.0
        while not self._done.is_set() and not self._decided.wait(INTERVAL / 4):
            # A machine that is cut off leaves the other thread waiting for the store.
            idle = idle + INTERVAL / 4 if rounds == self._rounds else 0.0
            rounds = self._rounds
            if idle > self.lost_after:
                self.verdict = self._without_store()
                self._decided.set()
        if self._decided.is_set() and not self._unwound.wait(UNWINDING) and not self._done.is_set():
            os.write(2, f"LostRankError: {self._names[self._rank]}: {_sentence(self.verdict)}\n".encode())
            os._exit(1)


def _sentence(verdict: str | None) -> str:
    return f"{verdict}. The same command resumes from the last checkpoint"


def _own_connection() -> Any:
    """A connection to the store of all ranks that no other thread waits on."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        store = dist.TCPStore(store.host, store.port, is_master=False, timeout=timedelta(seconds=30))
    return dist.PrefixStore(f"lost_ranks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
