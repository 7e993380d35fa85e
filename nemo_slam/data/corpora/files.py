"""Files that are whole or absent: temporary name, then rename. And the lock and the marker a recipe is guarded by."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAMPLE_RATE = 16000
_TEMPORARY = ".partial-"


class CorpusError(RuntimeError):
    """A corpus cannot be prepared here; the message says why and what to do instead."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that becomes ``path`` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's 0600 would hide the corpus from other users
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 ``text``, whole or not at all, and flushed to the disk."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_wav(path: Path, pcm: bytes) -> None:
    """Writes 16 kHz mono PCM16 ``pcm`` (little-endian bytes) as a wav file, whole or not at all."""
    with whole_file(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(pcm)


def remove_leftovers(root: Path) -> None:
    """Removes the temporary files that a killed preparation left below ``root``. Call it under ``locked`` only."""
    for leftover in root.rglob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Holds an inter-process lock (released by the kernel if its holder dies) on ``folder``/``.name.lock``.

    Raises:
        CorpusError: the folder cannot be written to, or its file system has no locks.
    """
    from filelock import FileLock

    from nemo_slam.data.locks import acquire

    lock = FileLock(folder / f".{name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        acquire(lock, f"prepares {folder}")
        # A client of NFS may take what the holder before has just made for absent, for a minute, until it sees the
        # folder change; its own file is such a change.
        with tempfile.NamedTemporaryFile(prefix=_TEMPORARY, dir=folder):
            pass
    except OSError as error:
        raise CorpusError(
            f"{folder}: nothing can be prepared there, it cannot be written to or locked ({error.strerror}): choose "
            "another folder, or do it from a machine that can"
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_marker(root: Path) -> bool:
    """Whether ``corpus.json`` below ``root`` is one of ours, complete or not."""
    return _marker(root) is not None


def read_marker(root: Path) -> dict[str, Any] | None:
    """``corpus.json`` below ``root`` if it is there, can be read, and every file it lists exists; else None."""
    marker = _marker(root)
    if marker is None or not all((root / name).is_file() for name in marker["sha256"]):
        return None
    return marker


def _marker(root: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((root / "corpus.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return marker if isinstance(marker, dict) and marker.get("sha256") and "request" in marker else None
