"""Splits by hash: nothing that belongs together is parted, whatever the order; the shares are about right."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_slam.data.corpora.splits import SHARES, group_splits, hash_fraction, pick

_ROWS = st.lists(
    st.tuples(st.integers(0, 25).map(lambda n: f"id-{n}"), st.lists(st.integers(0, 30).map(str), max_size=3)),
    max_size=60,
)


def _components(rows):
    """Connected ids by breadth-first search: what union-find must agree with."""
    by_id, by_key = {}, {}
    for name, keys in rows:
        by_id.setdefault(name, set()).update(keys)
        for key in keys:
            by_key.setdefault(key, set()).add(name)
    seen, components = set(), []
    for name in by_id:
        if name in seen:
            continue
        component, queue = set(), [name]
        while queue:
            current = queue.pop()
            if current not in component:
                component.add(current)
                queue += [other for key in by_id[current] for other in by_key[key]]
        seen |= component
        components.append(component)
    return components


@settings(deadline=None, max_examples=150)
@given(_ROWS, st.randoms(use_true_random=False))
def test_no_id_and_no_key_crosses(rows, shuffler):
    splits = group_splits(rows, "salt")
    assert splits.keys() == {name for name, _ in rows}
    for component in _components(rows):
        assert {splits[name] for name in component} == {pick(f"salt:{min(component)}", SHARES)}
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert group_splits(shuffled, "salt") == splits


def test_a_key_that_looks_like_an_id_does_not_join_them():
    rows = [(f"id-{n}", [f"id-{(n * 7 + 1) % 200}-text"]) for n in range(200)] + [("one", ["two"]), ("two", ["three"])]
    assert all(group_splits(rows, "s")[name] == pick(f"s:{name}", SHARES) for name in ("one", "two"))


def test_shares_hold_on_average():
    draw = random.Random(0)
    splits = group_splits(((f"prompt-{n}", [str(draw.random())]) for n in range(20000)), "salt")
    for split, share in SHARES.items():
        assert sum(value == split for value in splits.values()) / 20000 == pytest.approx(share, abs=0.01)


def test_hash_fraction_is_the_same_everywhere():
    # sha256("a") = ca978112ca1bbdca...
    assert hash_fraction("a") == 0xCA978112CA1BBDCA / 2**64


def test_shares_must_sum_to_one():
    with pytest.raises(ValueError, match="must sum to 1"):
        pick("a", {"train": 0.5, "dev": 0.4})
