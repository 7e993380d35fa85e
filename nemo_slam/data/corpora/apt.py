"""Fetches Debian or Ubuntu packages without root: apt-get with its lists and cache in a folder of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import unquote

from nemo_slam.data.corpora.files import CorpusError

WAYS_OUT = (
    "Ways out: `prepare_data.py mini_librispeech` (needs internet, no apt), `prepare_data.py synthetic` "
    "(no network once installed), or your own NeMo manifests (docs/data.md)."
)


def _apt(apt_get: str, state: Path, *arguments: str, debs: Path) -> None:
    options = {
        "Dir::State::Lists": state / "lists",
        "Dir::Cache": state / "cache",
        # As root, apt would switch to the user _apt, who need not be able to read our folder.
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": 1,
        "Acquire::http::Timeout": 20,
        "Acquire::https::Timeout": 20,
    }
    command = [apt_get, "-q", *(f"-o{key}={value}" for key, value in options.items()), *arguments]
    done = subprocess.run(
        command, cwd=state / "arriving", capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-6:])
        raise CorpusError(
            f"apt-get {arguments[0]} failed (exit status {done.returncode}); is this machine offline, or not Debian "
            f"or Ubuntu with the main/universe component?\n{tail}\nWith the .deb files at hand, put them into "
            f"{debs} and call again.\n{WAYS_OUT}"
        )


def fetch(packages: list[str], folder: Path) -> dict[str, Path]:
    """Downloads ``packages`` below ``folder``; apt checks every file against the signed package lists.

    Packages in ``folder``/debs are not fetched again: an earlier, killed call left them there whole, or the user.

    Returns:
        package name -> its .deb file.

    Raises:
        CorpusError: no apt-get, no network, or no such package.
    """
    folder = folder.resolve()
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    found = _present(debs)
    missing = [name for name in packages if name not in found]
    if missing:
        apt_get = shutil.which("apt-get")
        if apt_get is None:
            raise CorpusError(
                f"apt-get not found: this corpus comes from Debian or Ubuntu packages.\nPut the files "
                f"{', '.join(f'{name}_*.deb' for name in missing)} into {debs}, and call again.\n{WAYS_OUT}"
            )
        for old in folder.glob("apt-*"):
            shutil.rmtree(old, ignore_errors=True)
        # A folder of this call's own: an apt-get that outlived its killed parent still writes to the old one.
        state = Path(tempfile.mkdtemp(prefix="apt-", dir=folder))
        for needed in ("lists/partial", "cache/archives/partial", "arriving"):
            (state / needed).mkdir(parents=True)
        _apt(apt_get, state, "update", debs=debs)
        _apt(apt_get, state, "download", *missing, debs=debs)
        for deb in (state / "arriving").glob("*.deb"):
            os.replace(deb, debs / deb.name)
        shutil.rmtree(state, ignore_errors=True)
        found = _present(debs)
    absent = [name for name in packages if name not in found]
    if absent:
        raise CorpusError(f"apt-get download brought no {', '.join(absent)}.\n{WAYS_OUT}")
    return {name: found[name] for name in packages}


def _present(debs: Path) -> dict[str, Path]:
    return {deb.name.split("_")[0]: deb for deb in debs.glob("*.deb")}


def version(deb: Path) -> str:
    """Package version from the file name apt gives a package (``name_version_architecture.deb``)."""
    return unquote(deb.name.split("_")[1])
