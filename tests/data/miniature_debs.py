"""Writes miniature Debian packages, from the format's description and not with our reader."""

import io
import lzma
import tarfile
from pathlib import Path


def write_deb(path: Path, files: dict[str, bytes], compression: str = "xz") -> Path:
    """A package holding ``files`` (name without leading ./ -> content); compression: xz, gz or none."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz" if compression == "gz" else "w") as tar:
        tar.addfile(_member("./usr", tarfile.DIRTYPE))
        for name, content in files.items():
            member = _member(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = _member("./usr/link", tarfile.SYMTYPE)
        link.linkname = "elsewhere"
        tar.addfile(link)
    data, suffix = archive.getvalue(), "" if compression == "none" else f".{compression}"
    if compression == "xz":
        data = lzma.compress(data)
    parts = {"debian-binary": b"2.0\n", "control.tar": b"odd", f"data.tar{suffix}": data}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"!<arch>\n" + b"".join(_ar(name, content) for name, content in parts.items()))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    return member


def _ar(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
    return header.encode() + content + b"\n" * (len(content) % 2)
