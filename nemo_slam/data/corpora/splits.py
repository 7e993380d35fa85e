"""Train, dev and test by hash, with everything that belongs together in one split."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping

SHARES = {"train": 0.80, "dev": 0.08, "test": 0.12}


def hash_fraction(key: str) -> float:
    """Uniform number in [0, 1) that depends on ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def pick(key: str, shares: Mapping[str, float]) -> str:
    """Name whose share of [0, 1) holds the hash of ``key``. The shares are taken in order and must sum to 1."""
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares must sum to 1, got {dict(shares)}")
    position, edge = hash_fraction(key), 0.0
    for name, share in shares.items():
        edge += share
        if position < edge:
            return name
    return name  # rounding of the last edge


def group_splits(
    keys: Iterable[tuple[str, Iterable[Hashable]]], salt: str, shares: Mapping[str, float] = SHARES
) -> dict[str, str]:
    """Split of every id, such that ids sharing a key (a text, in any language) share the split.

    Args:
        keys: (id, its keys) pairs; an id may occur many times.
        salt: names the corpus, so that two corpora are split independently.
        shares: split names and their expected share of the groups.

    The split of a group follows its smallest id, so it does not depend on the order of ``keys``.
    """
    parent: dict[Hashable, Hashable] = {}

    def find(node: Hashable) -> Hashable:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    ids = set()
    for name, own in keys:
        ids.add(name)
        find(("id", name))
        for key in own:
            parent[find(("key", key))] = find(("id", name))
    smallest: dict[Hashable, str] = {}
    for name in ids:
        group = find(("id", name))
        smallest[group] = min(name, smallest.get(group, name))
    return {name: pick(f"{salt}:{smallest[find(('id', name))]}", shares) for name in sorted(ids)}
