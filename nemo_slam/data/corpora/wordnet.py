"""Example sentences of WordNet's synsets: quoted in the gloss of each line of `data.{noun,verb,adj,adv}`."""

from __future__ import annotations

import re
from collections.abc import Iterator

_QUOTED = re.compile(r'"([^"]+)"')


def examples(data: bytes) -> Iterator[str]:
    """Yields the example sentences of one WordNet data file. Lines of the licence header start with a space."""
    for line in data.decode("utf-8").splitlines():
        if line.startswith(" ") or " | " not in line:
            continue
        for example in _QUOTED.findall(line.split(" | ", 1)[1]):
            if len(example.split()) >= 3:
                yield example
