"""Reads a Debian package (.deb): an `ar` archive whose `data.tar.*` holds the files. Nothing is unpacked to disk."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from nemo_slam.data.corpora.files import CorpusError


def _ar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise CorpusError(f"{path}: not a Debian package (no ar header)")
        while header := file.read(60):
            if len(header) != 60 or header[58:] != b"`\n":
                raise CorpusError(f"{path}: damaged Debian package (bad ar member header)")
            name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
            content = file.read(size)
            if len(content) != size:
                raise CorpusError(f"{path}: truncated Debian package (member {name} ends early)")
            file.read(size % 2)
            yield name, content


def _data_tar(path: Path) -> bytes:
    """The data archive of the package, in a compression that tarfile reads."""
    for name, content in _ar_members(path):
        if name in ("data.tar", "data.tar.gz", "data.tar.xz", "data.tar.bz2"):
            return content
        if name == "data.tar.zst":  # Ubuntu's compression, which the standard library reads from Python 3.14 on only
            tool = shutil.which("dpkg-deb")
            if tool is None:
                raise CorpusError(f"{path}: compressed with zstd; install dpkg (dpkg-deb) to read it")
            done = subprocess.run([tool, "--fsys-tarfile", path], capture_output=True)
            if done.returncode:
                raise CorpusError(f"{path}: damaged Debian package ({done.stderr.decode(errors='replace').strip()})")
            return done.stdout
    raise CorpusError(f"{path}: damaged Debian package (no data.tar member)")


def read_deb(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name without leading ./, content) of every regular file in the package."""
    content = _data_tar(path)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as archive:
            for member in archive:
                if member.isreg() and (file := archive.extractfile(member)):
                    yield member.name.removeprefix("./"), file.read()
    except (tarfile.TarError, EOFError) as error:
        raise CorpusError(f"{path}: damaged Debian package ({error})") from error
