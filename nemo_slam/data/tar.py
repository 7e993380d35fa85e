"""NeMo tarred audio: where each member of the tar files lies, so that rows are read by position, in any order."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.manifest import RowError


class TarMembers:
    """The members of NeMo's tar files, by the name under which manifests know them.

    A row finds its member by its whole name or, as in NeMo, by base name without extension; rows that share a
    recording carry a `-sub<n>` suffix. Only headers are read.

    Args:
        paths: the tar files. A member that a truncated file does not hold completely is known, but unusable.
    """

    def __init__(self, paths: Sequence[Path]):
        self._members: dict[str, tuple[int, int, int]] = {}
        self._names: dict[str, list[str]] = {}  # base name without extension -> whole names
        self._broken: dict[str, Path] = {}
        self._damaged: list[str] = []
        for number, path in enumerate(paths):
            self._scan(number, path)

    def _scan(self, number: int, path: Path) -> None:
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    name = member.name
                    if name in self._members:
                        raise DataError(
                            f"{path} holds a second {member.name!r}: names must be unique over all tar files"
                        )
                    if member.offset_data + member.size > size:
                        self._broken[name] = path
                    else:
                        self._members[name] = (number, member.offset_data, member.size)
                    self._names.setdefault(Path(name).stem, []).append(name)
        except tarfile.ReadError as error:
            self._damaged.append(f"{path}: {error}")
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror})") from None

    def find(self, audio_filepath: str) -> tuple[int, int, int]:
        """Number of the tar file, byte offset and size of a row's audio. Raises RowError where there is none."""
        stem = Path(audio_filepath).stem
        named = [audio_filepath] if audio_filepath in self._members else self._names.get(stem)
        named = named or self._names.get(re.sub(r"-sub\d+$", "", stem), [])
        if len(named) > 1:
            raise RowError(f"{audio_filepath}: fits several members of the tar files: {', '.join(named[:3])}")
        for name in named:
            if name in self._broken:
                raise RowError(f"{audio_filepath}: cut off, {self._broken[name]} is truncated")
            return self._members[name]
        damaged = f" (not read to the end: {'; '.join(self._damaged)})" if self._damaged else ""
        raise RowError(f"{audio_filepath}: in none of the tar files{damaged}")
