"""Random words: Random123's known answers, independent Python arithmetic, and the float32 functions built on them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_batches import KEY
from kernel_oracles import philox4x32

from slam_kernels import philox, stream_key
from slam_kernels.reference.elementary import cos_sin_turn, gaussian, gumbel, log, open_uniform

# kat_vectors of the Random123 distribution, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 0xFFFFFFFF)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    signed = key[0] | key[1] << 32
    signed -= (1 << 64) if signed >> 63 else 0
    words = philox(signed, *(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == answer
    assert tuple(philox4x32(signed, *counter)) == answer


@settings(max_examples=200, deadline=None)
@given(key=st.integers(-(2**63), 2**63 - 1), counter=st.tuples(WORD, WORD, WORD, WORD))
def test_equals_python_integers(key, counter):
    assert [int(w) for w in philox(key, *(torch.tensor(c) for c in counter))] == philox4x32(key, *counter)


def test_broadcasts():
    words = philox(KEY, torch.arange(3)[:, None], torch.arange(2), torch.tensor(0), torch.tensor(9))
    assert all(w.shape == (3, 2) for w in words)
    assert [int(w[2, 1]) for w in words] == philox4x32(KEY, 2, 1, 0, 9)


def test_stream_keys_are_distinct_signed_64_bit():
    keys = {stream_key(seed, purpose) for seed in range(-3, 40) for purpose in range(40)}
    assert len(keys) == 43 * 40
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert stream_key(2**64 + 5, 1) == stream_key(5, 1)
    # Each bit of a good mixer is set about half of the time.
    for bit in range(64):
        assert 0.4 < sum(key >> bit & 1 for key in keys) / len(keys) < 0.6


def test_log_is_accurate_to_two_units_everywhere():
    edge = torch.tensor([2.0**-24, 1 - 2.0**-24, 0.5, 0.70710678, 0.7071068, 1.0, 16.635532, 1.17549435e-38, 3e38])
    x = torch.cat((edge, torch.rand(100_000).clamp(min=2**-24), torch.rand(1000) * 1e-6 + (1 - 1e-6)))
    exact = x.double().log()
    spacing = torch.nextafter(exact.abs().float(), torch.tensor(math.inf)).double() - exact.abs().float().double()
    assert float(((log(x).double() - exact).abs() / spacing.clamp(min=1e-300)).max()) < 2.0


def test_cosine_and_sine_of_every_kind_of_turn():
    turn = torch.cat(
        (torch.arange(64) * (1 << 18), torch.randint(0, 1 << 24, (100_000,)), torch.tensor([(1 << 24) - 1]))
    )
    angle = turn.double() * (2 * math.pi / 2**24)
    cos, sin = cos_sin_turn(turn)
    assert float((cos.double() - angle.cos()).abs().max()) < 2e-7
    assert float((sin.double() - angle.sin()).abs().max()) < 2e-7


def test_open_uniform_never_reaches_its_ends():
    u = open_uniform(torch.tensor([0, 1, 511, 512, 0xFFFFFFFF]))
    assert u.tolist() == [2**-24, 2**-24, 2**-24, 3 * 2**-24, 1 - 2**-24]


def test_gaussian_and_gumbel_moments():
    words = torch.stack(philox(KEY, torch.arange(100_000), *(torch.tensor(0),) * 3), dim=-1)
    n = words.numel()
    z = gaussian(words).double().flatten()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    g = gumbel(words).double().flatten()
    assert abs(float(g.mean()) - 0.5772156649) < 5 * math.pi / math.sqrt(6 * n)
    assert abs(float(g.var()) - math.pi**2 / 6) < 0.02
