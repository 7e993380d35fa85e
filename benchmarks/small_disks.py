"""Small disks for ``faults.py``: file systems in memory, in a mount namespace of this process's own.

They need root, or a kernel that lets users have namespaces of their own; nothing of them is seen by other processes, or
left when this one ends.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
_RECURSIVE, _PRIVATE, _DETACH = 0x4000, 1 << 18, 2
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def own_mounts() -> str:
    """Gives this process mounts of its own, before it has threads. Returns why that cannot be, or nothing."""
    user, group = os.getuid(), os.getgid()
    try:
        _call("unshare", _NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER)
        if user:
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
                Path(f"/proc/self/{name}").write_text(text)
        _call("mount", b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
        with small_disk(Path("/dev/shm"), 1 << 20):
            pass
    except OSError as error:
        return f"no mounts of its own ({error.strerror}); root has them, and in a container --privileged"
    return ""


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """An empty file system of so many bytes, in memory, over a folder."""
    _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())
    try:
        yield
    finally:
        _call("umount2", os.fsencode(folder), _DETACH)
