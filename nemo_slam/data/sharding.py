"""NeMo tarred audio out of manifests: in parallel, restartable, the same bytes whenever it is made.

Which row goes into which shard is a function of the manifests, the seed and the number of shards. A shard is made by
one process and appears by renames, its record last; a shard that has a record is not made again. Layout:

    audio_<i>.tar                        the shard's utterances, whole files or cut out of long ones
    audio_<i>.tar.idx                    where each member begins, then the tar's size, as NeMo has it (uint64)
    sharded_manifests/manifest_<i>.json  the shard's rows, in the tar's order
    tarred_audio_manifest.json           all rows, shard after shard
    shards.json                          settings, counts and checksums; written last
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from array import array
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from nemo_slam.data.bad_rows import BadRow, DataError
from nemo_slam.data.corpora.files import sha256
from nemo_slam.data.manifest import RowError, parse_row, scan_lines
from nemo_slam.data.one_shard import is_made, make_shard, record_path
from nemo_slam.data.sampling import keyed_permutation
from nemo_slam.data.shard_files import (
    damaged,
    describe_files,
    digest_of,
    remove_parts,
    sizes_agree,
    write_json,
    write_whole,
)

logger = logging.getLogger(__name__)

_SHUFFLE = 5  # of sampling's purposes, used by no stream
_PROBED = 256
CODECS = ("keep", "flac")


@dataclass(frozen=True)
class ShardSettings:
    """Attributes:
    shards: how many tar files.
    seed: of the order in which rows are spread over them; None keeps the manifests' order.
    min_duration, max_duration: in seconds; other rows are left out and counted.
    codec: ``keep`` the files as they are, or ``flac`` for all. Rows with an offset, and rows that are part of a longer
        file, are cut out and become FLAC either way: 16 bits where the source has no more, else 24.
    """

    shards: int
    seed: int | None = 0
    min_duration: float = 0.0
    max_duration: float = float("inf")
    codec: str = "keep"

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise DataError(f"the number of shards must be at least 1, got {self.shards}")
        if self.codec not in CODECS:
            raise DataError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")


@dataclass
class Rows:
    """Where the usable rows lie. *Shape:* all (n,): number of the manifest, line, byte offset, size."""

    places: np.ndarray
    bad: list[BadRow]
    filtered: int


def make_shards(manifests: Sequence[Path], out: Path, settings: ShardSettings, workers: int) -> dict[str, Any]:
    """Makes what is missing of a sharded corpus; returns what ``shards.json`` holds.

    Raises:
        DataError: the folder holds shards of other manifests or settings, another process is at work in it, or no row
            is usable.
    """
    (out / "sharded_manifests").mkdir(parents=True, exist_ok=True)
    (out / ".records").mkdir(exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            return _make(manifests, out, settings, workers)
    except Timeout:
        raise DataError(f"{out}: another process is making shards there; it holds {out / '.lock'}") from None


def _make(manifests: Sequence[Path], out: Path, settings: ShardSettings, workers: int) -> dict[str, Any]:
    remove_parts(out)
    sources = [{"manifest": str(m.absolute()), "sha256": sha256(_readable(m))} for m in manifests]
    plan = {"sources": sources, **asdict(settings), "max_duration": str(settings.max_duration)}
    _check_plan(out / "plan.json", plan)
    identity = digest_of(plan)
    if _finished(out, identity):
        logger.info("%s is complete", out)
        return read_corpus(out)
    rows = _scan(manifests, settings)
    if len(rows.places) < settings.shards:
        raise DataError(
            f"{len(rows.places)} usable rows for {settings.shards} shards ({rows.filtered} outside the duration "
            f"limits, {len(rows.bad)} bad{f', the first: {rows.bad[0]}' if rows.bad else ''}): ask for fewer shards"
        )
    if settings.seed is not None:
        order = keyed_permutation(len(rows.places), seed=settings.seed, purpose=_SHUFFLE, use=0, epoch=0, block=0)
        rows.places = rows.places[order]
    cuts = [len(rows.places) * s // settings.shards for s in range(settings.shards + 1)]
    missing = [s for s in range(settings.shards) if not is_made(out, s, identity)]
    if len(missing) < settings.shards:
        logger.info("%d of %d shards are there already", settings.shards - len(missing), settings.shards)
    probes = rows.places[np.unique(np.linspace(0, len(rows.places) - 1, _PROBED).astype(np.int64))]
    # Fresh interpreters: nothing of this process, its lock included, lives on in a worker.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [
            pool.submit(
                make_shard,
                manifests,
                rows.places[cuts[s] : cuts[s + 1]],
                cuts[s],
                out,
                s,
                settings.codec,
                identity,
                probes,
            )
            for s in missing
        ]
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                job.result()
                logger.info("%d of %d shards made", done, len(missing))
        except BaseException:  # said now, not when all others are made
            pool.shutdown(cancel_futures=True)
            raise
    return _finish(out, plan, rows, settings.shards)


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"cannot read {path}: check the path")
    return path


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    """One folder, one plan: shards of two would overlap and miss rows."""
    if path.exists():
        before = json.loads(path.read_text())
        changed = [key for key in plan if plan[key] != before.get(key)]
        if changed:
            raise DataError(
                f"{path.parent} holds shards made otherwise: {', '.join(changed)} changed. Name another folder, or "
                "delete this one"
            )
    else:
        write_json(path, plan)


def _scan(manifests: Sequence[Path], settings: ShardSettings) -> Rows:
    """Places of the usable rows, in order. *Shape:* (n, 4) int64."""
    places = array("q")  # 32 bytes a row, of which there may be many millions
    bad: list[BadRow] = []
    filtered = 0
    for number, manifest in enumerate(manifests):
        for line, offset, raw in scan_lines(manifest):
            if raw.isspace():
                continue
            try:
                duration = parse_row(raw, need_text=False).duration
            except RowError as error:
                bad.append(BadRow(str(manifest), line, str(error)))
                continue
            if settings.min_duration <= duration <= settings.max_duration:
                places.extend((number, line, offset, len(raw)))
            else:
                filtered += 1
    return Rows(np.array(places, np.int64).reshape(-1, 4), bad, filtered)


def _finished(out: Path, identity: str) -> bool:
    if not (out / "shards.json").exists():
        return False
    corpus = read_corpus(out)
    return corpus["identity"] == identity and sizes_agree(out, corpus["files"])


def _finish(out: Path, plan: dict[str, Any], rows: Rows, shards: int) -> dict[str, Any]:
    records = [json.loads(record_path(out, s).read_text()) for s in range(shards)]
    whole = out / "tarred_audio_manifest.json"
    write_whole(whole, b"".join((out / "sharded_manifests" / f"manifest_{s}.json").read_bytes() for s in range(shards)))
    bad = [*(vars(row) for row in rows.bad), *(row for record in records for row in record["bad"])]
    files = {name: file for record in records for name, file in record["files"].items()}
    corpus = {
        "identity": digest_of(plan),
        "plan": plan,
        "rows": sum(record["rows"] for record in records),
        "hours": round(sum(record["seconds"] for record in records) / 3600, 4),
        "filtered": rows.filtered,
        "bad": bad,
        "files": files | describe_files(out, [whole]),
    }
    write_json(out / "shards.json", corpus)
    return corpus


def read_corpus(out: Path) -> dict[str, Any]:
    """What ``shards.json`` holds. Raises DataError where the folder is no finished corpus."""
    path = out / "shards.json"
    if not path.exists():
        raise DataError(f"{path} does not exist: the shards are not finished; the same command goes on")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): delete it, and the same command writes it anew") from None


def verify(out: Path) -> list[str]:
    """Everything that is wrong with a finished corpus, file by file."""
    return damaged(out, read_corpus(out)["files"])
