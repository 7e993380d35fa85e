"""Lets NeMo restore models on Python 3.10.0-3.10.11 and 3.11.0-3.11.3 (Debian 12 has 3.11.2).

NeMo 3.0 unpacks a ``.nemo`` with ``TarFile.extract(..., filter="data")``, an argument that Python's security releases
of 2023 brought. Older ones get the same refusals here: members outside the folder, links, devices.
"""

from __future__ import annotations

import functools
import os
import tarfile
from typing import Any


def register() -> None:
    """Teach ``TarFile.extract`` the filter "data" where Python has none."""
    if hasattr(tarfile, "data_filter"):
        return
    extract = tarfile.TarFile.extract

    @functools.wraps(extract)
    def extract_filtered(
        self: tarfile.TarFile, member: Any, path: Any = "", *args: Any, filter: Any = None, **options: Any
    ) -> None:
        if filter is not None:
            if filter != "data":
                raise ValueError(f"this Python's tarfile has no filters; nemo_slam adds 'data' alone, not {filter!r}")
            member = self.getmember(member) if isinstance(member, str) else member
            folder = os.path.realpath(path)
            inside = os.path.commonpath([folder, os.path.realpath(os.path.join(folder, member.name))]) == folder
            if not inside or os.path.isabs(member.name) or not (member.isreg() or member.isdir()):
                raise tarfile.ExtractError(f"{member.name!r} is not a plain file or folder below {folder}")
        extract(self, member, path, *args, **options)

    tarfile.TarFile.extract = extract_filtered  # type: ignore[method-assign]
