"""Keeps the packages of a base image as they are while a project is installed on top of them.

    python3 docker/base_packages.py pin PINS CONSTRAINTS OUT   # before: what is here, then pins for what is not
    python3 docker/base_packages.py requirements OUT           # the project's, without what the base brings
    python3 docker/base_packages.py check PINS                 # after: fails if anything pinned has moved

NVIDIA's containers carry their own builds of torch, Transformer Engine and apex, compiled against each other. The
package index has other builds of the same versions, so that one careless requirement replaces them.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import tomllib

PROTECTED = re.compile(
    r"torch|torchvision|torchaudio|torchao|(pytorch-)?triton|transformer-engine.*|apex|flash-attn.*|numpy|nvidia-.*|cuda-.*"
)
"""Packages of the base that must not change: compiled against each other, or against the container's CUDA libraries."""

BROUGHT_BY_BASE = ("torch", "triton")
"""Requirements of the project that are not installed where the base has torch."""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Version of every installed package, by normalised name."""
    found = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
    return {normalised(name): version for name, version in found if name}


def pin(pins: Path, constraints: Path, out: Path) -> None:
    """Write the base's protected packages to ``pins``, and those plus the constraints of all others to ``out``."""
    here = installed()
    base = {name: version for name, version in sorted(here.items()) if PROTECTED.fullmatch(name)}
    lines = [f"{name}=={version}" for name, version in base.items()]
    pins.write_text("".join(f"{line}\n" for line in lines))
    for line in constraints.read_text().splitlines():
        name = normalised(re.match(r"[\w.-]*", line)[0])
        if name and name not in here:
            lines.append(line)
    out.write_text("".join(f"{line}\n" for line in lines))
    print(f"pinned from the base: {', '.join(f'{n} {v}' for n, v in base.items()) or 'nothing'}")


def requirements(out: Path) -> None:
    """Write the project's requirements, tests included; where the base has torch, without torch and triton.

    Triton goes by several names, so that a base may have it and pip not know.
    """
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    if "torch" in installed():
        wanted = [line for line in wanted if normalised(re.match(r"[\w.-]+", line)[0]) not in BROUGHT_BY_BASE]
    out.write_text("".join(f"{line}\n" for line in wanted))


def check(pins: Path) -> None:
    """Fail if a pinned package has another version now, or is gone."""
    here = installed()
    wanted = dict(line.split("==", 1) for line in pins.read_text().splitlines())
    moved = [name for name, version in wanted.items() if here.get(name) != version]
    if moved:
        changes = [f"  {name}: {wanted[name]} -> {here.get(name, 'gone')}" for name in moved]
        raise SystemExit("\n".join(["installing the project replaced packages of the base image:", *changes]))
    print(f"{len(wanted)} packages of the base image are as they were")


def main() -> None:
    commands = {"pin": (pin, 3), "requirements": (requirements, 1), "check": (check, 1)}
    command, count = commands.get(sys.argv[1] if len(sys.argv) > 1 else "", (None, 0))
    if command is None or len(sys.argv) != 2 + count:
        raise SystemExit(__doc__)
    command(*map(Path, sys.argv[2:]))


if __name__ == "__main__":
    main()
