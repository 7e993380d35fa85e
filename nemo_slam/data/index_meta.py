"""What an index says of itself, `meta.json`, and the checksums that tell whether it is as it was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_slam.data.bad_rows import DataError

META_FILE = "meta.json"
_DIGEST = "own_digest"
_BLOCK = 1 << 20


def write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Writes JSON values, with a checksum of their own."""
    path.write_text(json.dumps({**meta, _DIGEST: _digest(meta)}, indent=1), encoding="utf-8")


def read_meta(path: Path, version: int) -> dict[str, Any]:
    """What `write_meta` wrote, of the given version. Raises DataError where it is not that any more, or OSError."""
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error!s:.80}") from None
    if not isinstance(meta, dict) or meta.get("version") != version:
        found = meta.get("version") if isinstance(meta, dict) else type(meta).__name__
        raise DataError(f"{path}: version {found!r:.40}, expected {version}")
    if meta.pop(_DIGEST, None) != _digest(meta):
        raise DataError(f"{path} is damaged: its content does not match its checksum")
    return meta


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> list:
    """Size and checksum of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        return [file.tell(), digest.hexdigest()]


def check_files(folder: Path, files: Mapping[str, list], at_most: int) -> None:
    """Compares files with what `file_digest` said of them; of those above `at_most` bytes only the size.

    Raises:
        DataError: one differs. OSError: one is missing.
    """
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size
        if size != expected[0]:
            raise DataError(f"{path} is damaged: {size} bytes, expected {expected[0]}")
        if size <= at_most and file_digest(path) != expected:
            raise DataError(f"{path} is damaged: its content does not match its checksum")


def flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
