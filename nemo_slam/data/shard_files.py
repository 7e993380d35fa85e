"""Finished files of a sharded corpus: each appears whole, with its checksum, and can be checked later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_slam.data.corpora.files import sha256

CHECKSUMS = "checksums.json"
"""Beside the files of an index folder, what `describe_files` says of them."""


def digest_of(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Writes under another name, flushes, then renames: a kill leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def remove_parts(folder: Path) -> None:
    """What killed processes left behind."""
    for part in folder.rglob("*.part-*"):
        part.unlink(missing_ok=True)


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and checksum of each, by its name relative to the folder."""
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def sizes_agree(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all are there with their sizes: enough to go on after a kill, since files appear whole."""
    return all((folder / name).is_file() and (folder / name).stat().st_size == f["bytes"] for name, f in files.items())


def damaged(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with each file that is not as it was written."""
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, written with {expected['bytes']}")
        elif (found := sha256(path)) != expected["sha256"]:
            problems.append(f"{path}: corrupted, its SHA-256 is {found}, written with {expected['sha256']}")
    return problems


def damaged_beside(folder: Path) -> list[str]:
    """The same for a folder with its ``CHECKSUMS``."""
    return damaged(folder, json.loads((folder / CHECKSUMS).read_text()))
