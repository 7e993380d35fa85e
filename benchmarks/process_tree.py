"""What a process and all that it started use, read from /proc: memory, processor time, open files, threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """Sums over a tree of processes.

    Attributes:
        resident_mib: resident memory; what processes share counts once for each, so that it does not grow where one
            of them writes to its copy.
        cpu_seconds: of the processes that live; the largest sum so far is what has been used.
    """

    processes: int
    resident_mib: float
    cpu_seconds: float
    open_files: int
    threads: int


def tree(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                continue  # a thread that has ended
    return found


def usage(pid: int) -> Usage:
    """Of the tree under ``pid``; a process that ends meanwhile counts as far as it was read."""
    resident = cpu = 0.0
    processes = files = threads = 0
    for member in tree(pid):
        folder = Path(f"/proc/{member}")
        try:
            resident += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            threads += int(fields[17])
            files += len(os.listdir(folder / "fd"))
            processes += 1
        except OSError:
            continue
    return Usage(processes, round(resident, 2), round(cpu, 2), files, threads)
