"""Damaged inputs for the readers' tests, each a function of (seed, reader, number), and the bounds they must keep.

`FUZZ_INPUTS` is their number over all readers, `FUZZ_SEED` the seed; a failure names both, and the number with which
`FUZZ_ONLY` repeats it alone. `make fuzz N=1000000` runs more of them, with a new seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEED = int(os.environ.get("FUZZ_SEED") or 0)
INPUTS = int(os.environ.get("FUZZ_INPUTS") or 10_000)
ONLY = os.environ.get("FUZZ_ONLY")
SHARES = {"manifest": 0.35, "text": 0.25, "index": 0.06, "config": 0.34}
"""Of all inputs; an index is the dearest."""
SECONDS = 60.0
"""An input that takes longer counts as a hang."""

BYTES = [
    *(
        b"\x00",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b" ",
        b"\t",
        b"\x0b",
        b"\x0c",
        b"\x1c",
        b"\x85",
        b"\xa0",
        b"\xff",
        b"\xfe",
    ),
    *(
        b"\xef\xbb\xbf",
        b"\xc2\xa0",
        b"\xe2\x80\xa8",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xf0\x9f\x98\x80",
        b"\\u0000",
        b"\\ud800",
    ),
    *(
        b'"',
        b"'",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"-",
        b".",
        b"e",
        b"0",
        b"NaN",
        b"Infinity",
        b"null",
        b"true",
    ),
    *(b"1e999", b"1e308", b"-0", b"9" * 30, b"9" * 5000, b"[" * 3000, b"{}", b"~", b"/", b"../", b"#", b"${x}", b"???"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 0.0, -0.0, 0.5, 1e-9, 1e308, -1e308, 1e15, 2**31, 2**63, 2**64, 10**400),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "\x00",
        "a\x00b",
        "~",
        "~\x00",
        "~nobody/a.wav",
        "\ud800",
        "é",
    ),
    *(
        "\u00a0",
        "\u2028",
        "x" * 5000,
        "1.5",
        "nan",
        [],
        {},
        [[]],
        ["a"],
        [1],
        [None],
        {"a": 1},
        "{0..3}",
        "???",
        "a{3..1}",
    ),
]


def inputs(reader: str) -> Iterator[tuple[int, random.Random]]:
    """Number and generator of each input of a reader."""
    numbers = [int(ONLY)] if ONLY else range(round(INPUTS * SHARES[reader]))
    for number in numbers:
        yield number, random.Random(f"{SEED} {reader} {number}")


TOGETHER = 25
"""Inputs that are files of one index: building an index costs more than reading so small a file."""


def in_groups(reader: str) -> Iterator[tuple[random.Random, list[tuple[int, random.Random]]]]:
    """The inputs in groups, each with a generator for what a group has in common, which one input alone gets, too."""
    group: list[tuple[int, random.Random]] = []
    for number, generator in inputs(reader):
        if group and number // TOGETHER != group[0][0] // TOGETHER:
            yield random.Random(f"{SEED} {reader} group {group[0][0] // TOGETHER}"), group
            group = []
        group.append((number, generator))
    if group:
        yield random.Random(f"{SEED} {reader} group {group[0][0] // TOGETHER}"), group


@contextmanager
def told(reader: str, number: int, shown: Any = "") -> Iterator[None]:
    """Bounds the time of one input, and names it where something goes wrong."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"no answer after {SECONDS:g} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except Exception as error:
        repeat = f"FUZZ_SEED={SEED} FUZZ_ONLY={number} pytest tests/fuzz -k {reader}"
        raise AssertionError(f"{repeat}\n{type(error).__name__}: {error}\n{shown!r:.3000}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def damaged(random: random.Random, content: bytes) -> bytes:
    """One to three changes: bytes flipped, put in, taken out, doubled or cut off."""
    for _ in range(random.randint(1, 3)):
        at = random.randint(0, len(content))
        end = min(len(content), at + random.choice([1, 1, 2, 8, 40]))
        kind = random.randrange(5)
        if kind == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + random.choice(BYTES) + content[at:]
        elif kind == 2:
            content = content[:at] + content[end:]
        elif kind == 3:
            content = content[:end] + content[at:]
        elif random.random() < 0.3:
            content = content[:at]
    return content


def damaged_row(random: random.Random, row: dict[str, Any]) -> bytes:
    """A row of JSON with a value, a key or some bytes changed; as often as not, as it was."""
    row, kind = dict(row), random.randrange(8)
    key = random.choice([*row])
    if kind == 0:
        row[key] = random.choice(VALUES)
    elif kind == 1:
        del row[key]
    elif kind == 2:
        row[f"{key}{random.choice(['', 's', ' '])}"] = row.pop(key)
    line = json.dumps(row, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == 3:
        line = line[:-1] + b", " + json.dumps({key: random.choice(VALUES)}).encode()[1:]  # a key twice
    return damaged(random, line) if kind == 4 else line


def joined(random: random.Random, lines: list[bytes]) -> bytes:
    """Lines as a file: with either line end, blank lines, a byte-order mark, or no end at all."""
    end = random.choice([b"\n", b"\n", b"\r\n"])
    blank = [b"", b" ", b"\t", b"\x0c"]
    content = b""
    for line in lines:
        content += line + end + (random.choice(blank) + end if random.random() < 0.1 else b"")
    if random.random() < 0.15:
        content = b"\xef\xbb\xbf" + content
    if random.random() < 0.2:
        content = content[: -len(end)]
    return damaged(random, content) if random.random() < 0.1 else content


def checked(reader: str, check: Callable[[dict[Path, bytes]], Counter[str]], files: dict[Path, bytes]) -> Counter[str]:
    """Checks files together; where that fails, each alone, to tell which it is. A file's name is its input's number.

    ``check`` leaves its index in the folder `index` beside the files.
    """
    first = int(next(iter(files)).stem)

    def of(some: dict[Path, bytes]) -> Counter[str]:
        for path, content in some.items():
            path.write_bytes(content)
        index = path.parent / "index"
        try:
            return check(some)
        finally:
            shutil.rmtree(index)
            for path in some:
                path.unlink()

    try:
        with told(reader, first):
            return of(files)
    except AssertionError:
        for path, content in files.items():
            with told(reader, int(path.stem), content):
                of({path: content})
        raise
