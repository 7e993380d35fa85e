"""Where an index lies, and what tells whether it matches its sources."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.remote import Source, is_remote
from nemo_slam.data.remote import fingerprint as remote_fingerprint

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".nemo_slam_index"
_HEAD = 1 << 16


def fingerprint(source: Source) -> list:
    """Path, size, time and a hash of both ends of a file; of a remote one, URL, size and what its store knows."""
    try:
        if isinstance(source, str) and is_remote(source):
            return remote_fingerprint(source)
        with open(source, "rb") as file:
            stat = os.fstat(file.fileno())
            digest = hashlib.blake2b(file.read(_HEAD), digest_size=16)
            file.seek(max(0, stat.st_size - _HEAD))
            digest.update(file.read(_HEAD))
    except OSError as error:
        raise DataError(
            f"cannot read {source} ({error.strerror}): check the path in the configuration, or prepare the corpus first"
        ) from None
    return [str(Path(source).absolute()), stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def cache_folders(beside: Path) -> list[Path]:
    """Where indexes may lie, best first: beside the sources, in the user's cache, in a temporary folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    of_user = [user / "nemo_slam"] if str(user)[0] != "~" else []  # a container's user may have no home
    return [beside / CACHE_FOLDER, *of_user, Path(tempfile.gettempdir()) / f"nemo_slam_{os.getuid()}"]


def first_writable(folders: Sequence[Path]) -> Path:
    tried: list[str] = []
    for folder in folders:
        problem = _why_not_writable(folder)
        if not problem:
            if tried:
                logger.warning("cannot write %s; the index goes to %s", "; ".join(tried), folder)
            return folder
        tried.append(f"{folder} ({problem})")
    raise DataError(f"no writable folder for the index: {'; '.join(tried)}. Name one as cache_dir")


def _why_not_writable(folder: Path) -> str | None:
    """None where files can be made and locked. Network file systems are mounted without locks too."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
    except OSError as error:
        return error.strerror or str(error)


def short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
