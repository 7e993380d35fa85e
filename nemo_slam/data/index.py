"""Memory-mapped indexes: what the sampler and the streams need to know of a corpus, without holding the corpus.

An index is a folder of flat arrays plus `meta.json`, built on first use. Its name carries a hash of the settings and
one of the sources (path, size, time, first and last bytes), so an index that does not match its sources is never
opened: it is rebuilt, and that is said. It is written under a file lock and appears by one rename, so that several
processes on a machine build it once and nobody sees half of one. Checksums tell a damaged one, which is rebuilt too.

Layout, one entry a row (an example): `length` and whatever the stream adds; for all: `shard_offsets`, `shard_lengths`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock

from nemo_slam.data.bad_rows import BadRow, DataError
from nemo_slam.data.index_folder import cache_folders, fingerprint, first_writable, short_hash
from nemo_slam.data.index_meta import META_FILE, check_files, file_digest, flush, read_meta, write_meta
from nemo_slam.data.locks import acquire
from nemo_slam.data.remote import Source

logger = logging.getLogger(__name__)

INDEX_VERSION = 3
CHECKED_BYTES = 1 << 28
"""Files up to this size are read whole when an index is opened, to see whether they are damaged: 0.3 s each at most.

Of a larger one only the size is checked. Every rank reads, so the limit keeps the start of a large run short.
"""
KEPT_SECONDS = 86_400
"""An index that does not match its sources is removed when the next is built, unless it is younger.

Another run, or a machine with a copy of the sources that has other times, may be reading it; on a network file system
it would be lost to them.
"""
SHARD_ROWS = 8192  # a shard never crosses a source file
_FLUSH_ROWS = 1 << 16
_PROGRESS_ROWS = 1_000_000
_AT_ONCE = 32
_BAD_FILE = "bad.jsonl"


class Index:
    """An open index. Arrays are attributes, memory-mapped and read-only; it pickles as its folder's name.

    Attributes:
        folder: where it lies. DataError if what lies there is damaged.
        meta: `rows`, `filtered` (reason -> count), `bad` (count), `digest` (of the content, tokens included) and what
            the stream adds.
        length: (n,) int32, in the unit of the stream's budget.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder / META_FILE, INDEX_VERSION)
        check_files(self.folder, self.meta["files"], CHECKED_BYTES)
        self._arrays: dict[str, np.ndarray] = {}
        for name, (dtype, size) in self.meta["arrays"].items():
            path = self.folder / f"{name}.bin"
            array = np.memmap(path, dtype, "r", shape=(size,)) if size else np.zeros(0, dtype)
            self._arrays[name] = np.asarray(array)  # a plain view: np.memmap's own indexing is slow

    def __getattr__(self, name: str) -> np.ndarray:
        try:
            return self.__dict__["_arrays"][name]
        except KeyError:
            raise AttributeError(f"{self.__dict__.get('folder')} has no array {name!r}") from None

    def __reduce__(self):
        return Index, (self.folder,)

    def __len__(self) -> int:
        """Number of rows (examples)."""
        return self.meta["rows"]

    @property
    def lengths(self) -> np.ndarray:
        """The name that the sampler knows."""
        return self.length

    def bad_rows(self, at_most: int | None = None) -> list[BadRow]:
        """The rows that the scan refused, or the first of them."""
        with open(self.folder / _BAD_FILE, encoding="utf-8") as file:
            return [BadRow(**json.loads(line)) for line in islice(file, at_most)]


class IndexBuilder:
    """Writes an index row by row, in constant memory.

    Args:
        folder: an existing empty folder.
        columns: name -> dtype of each row's fields; `length` is among them.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str]):
        self.folder = folder
        self.columns = dict(columns)
        self.arrays: dict[str, tuple[str, int]] = {}
        self.meta: dict = {}
        self.filtered: Counter[str] = Counter()
        self.rows = self.bad = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self._pending: list[tuple] = []
        self._shard_rows: list[int] = []
        self._shard_lengths: list[int] = []
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in columns}  # noqa: SIM115
        self._bad_file = open(folder / _BAD_FILE, "w", encoding="utf-8")  # noqa: SIM115

    def add(self, *row) -> None:
        """Adds a row: its fields in the order of `columns`."""
        self._pending.append(row)
        if len(self._pending) == _FLUSH_ROWS:
            self._flush()

    def add_bad(self, row: BadRow) -> None:
        """Notes a row that cannot be used."""
        self.bad += 1
        self._bad_file.write(json.dumps({"file": row.file, "line": row.line, "reason": row.reason}) + "\n")

    def end_source(self) -> None:
        """Closes the running shard: the next row comes from another file."""
        self._flush()

    def add_array(self, name: str, array: np.ndarray) -> None:
        """Stores an array that is not one entry a row, or is computed after the scan."""
        array.tofile(self.folder / f"{name}.bin")
        self.arrays[name] = (array.dtype.str, len(array))

    def column(self, name: str) -> np.ndarray:
        """All rows' values of a column, for what is computed after the scan."""
        self._flush()
        self._files[name].flush()
        return np.fromfile(self.folder / f"{name}.bin", self.columns[name])

    def finish(self) -> None:
        """Writes what remains, then `meta.json`."""
        self._flush()
        added = sorted(self.arrays)  # the stream's own, its tokens among them
        for name, file in self._files.items():
            file.close()
            self.arrays[name] = (np.dtype(self.columns[name]).str, self.rows)
        self._bad_file.close()
        self.add_array("shard_offsets", np.cumsum([0, *self._shard_rows], dtype=np.int64))
        self.add_array("shard_lengths", np.array(self._shard_lengths, np.int64))
        files = {name: file_digest(self.folder / name) for name in [*(f"{a}.bin" for a in self.arrays), _BAD_FILE]}
        for name in added:  # lengths and lines alone would be those of another text too
            self._digest.update(files[f"{name}.bin"][1].encode())
        meta = {
            "version": INDEX_VERSION,
            "rows": self.rows,
            "total_length": sum(self._shard_lengths),
            "bad": self.bad,
            "filtered": dict(self.filtered),
            "digest": self._digest.hexdigest(),
            "arrays": self.arrays,
            "files": files,
            **self.meta,
        }
        write_meta(self.folder / META_FILE, meta)
        for path in self.folder.iterdir():  # before the rename: a crash of the machine may leave empty files, and what
            if path.stat().st_size > CHECKED_BYTES:  # is opened without a look at all of it must not be one of them
                flush(path)

    def close(self) -> None:
        """Closes the files of a build that failed."""
        for file in [*self._files.values(), self._bad_file]:
            file.close()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        # SHARD_ROWS divides _FLUSH_ROWS, so only a file's last flush leaves a short shard.
        for (name, dtype), values in zip(self.columns.items(), zip(*pending, strict=True), strict=True):
            array = np.array(values, dtype)
            array.tofile(self._files[name])
            self._digest.update(array.data)
            if name == "length":
                starts = np.arange(0, len(array), SHARD_ROWS)
                self._shard_lengths += np.add.reduceat(array, starts, dtype=np.int64).tolist()
                self._shard_rows += np.diff(np.append(starts, len(array))).tolist()
        self.rows += len(pending)
        if self.rows // _PROGRESS_ROWS > (self.rows - len(pending)) // _PROGRESS_ROWS:
            logger.info("indexed %s rows", f"{self.rows:,}")


def open_index(
    kind: str,
    sources: Sequence[Source],
    settings: Mapping,
    columns: Mapping[str, str],
    scan: Callable[[IndexBuilder], None],
    cache_dir: str | None = None,
) -> Index:
    """Opens the index of `sources` under `settings`, building it first where there is none.

    Args:
        kind: the stream's name, for the folder's name and messages.
        sources: the files that the index describes; the first lies here, others may be URLs.
        settings: everything else that its content depends on (JSON values).
        columns: see `IndexBuilder`.
        scan: fills the builder.
        cache_dir: where indexes lie; default beside the first source, or a user cache if that is not writable.

    Raises:
        DataError: a source is missing, or `cache_dir` is not writable.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # every rank asks of each file, and most of that is waiting
        prints = list(pool.map(fingerprint, sources))
    named = json.dumps([INDEX_VERSION, kind, settings, columns, [p[0] for p in prints]], sort_keys=True)
    prefix = f"{kind}-{short_hash(named)}"
    name = f"{prefix}-{short_hash(json.dumps(prints))}"
    caches = cache_folders(Path(sources[0]).parent) if cache_dir is None else [Path(cache_dir)]
    for cache in caches:  # a folder that cannot be written may hold an index that can be read
        index = _try_open(cache / name)
        if index is not None:
            return index
    cache = first_writable(caches)
    lock = FileLock(cache / f"{prefix}-{os.getuid()}.lock")  # a user's own: another's could not be opened
    with acquire(lock, f"builds the index {cache / name}"):
        index = _try_open(cache / name)  # another process may have built it while this one waited
        if index is None:
            _build(cache / name, prefix, columns, scan, kind)
            index = Index(cache / name)
    return index


def _build(folder: Path, prefix: str, columns: Mapping[str, str], scan: Callable, kind: str) -> None:
    """Builds into a temporary folder and renames it into place. The caller holds the lock."""
    outdated = [p for p in folder.parent.glob(f"{prefix}-*") if p != folder and p.is_dir()]
    if folder.exists():
        if _try_open(folder) is not None:  # another machine's, which a network file system has just begun to show
            return
        logger.warning("the index %s is damaged: building it anew", folder)
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    elif outdated:
        logger.warning("the index %s does not match its sources any more: building it anew", outdated[0])
    else:
        logger.info("building the index of stream kind %r: %s", kind, folder)
    mine = f"{prefix}.building-{os.uname().nodename}-{os.getuid()}"
    for leftover in folder.parent.glob(f"{mine}-*"):  # of a build that was killed: the lock is held
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.parent / f"{mine}-{os.getpid()}"
    temporary.mkdir()
    try:
        builder = IndexBuilder(temporary, columns)
        try:
            scan(builder)
            builder.finish()
        finally:
            builder.close()
        try:
            os.rename(temporary, folder)
        except OSError:
            if _try_open(folder) is None:  # not built meanwhile by another machine or user either
                raise
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in outdated:
        with suppress(OSError):  # another user's, or gone already
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old)


def _try_open(folder: Path) -> Index | None:
    """The index, or None where there is none to read, or a damaged one.

    Any other error, such as too many open files or a network file system that fails, says nothing of the index: others
    may be reading it, so that it must not be built anew.
    """
    if not os.path.isdir(folder):  # False too where a folder above it must not be read
        return None
    try:
        return Index(folder)
    except (FileNotFoundError, PermissionError, DataError) as error:
        logger.warning("cannot use the index %s (%s)", folder, error)
        return None
