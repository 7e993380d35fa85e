"""Named random streams: every draw is a function of (seed, purpose, epoch, example, place), never of a generator's
state."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from slam_kernels import stream_key

STREAM_SHIFT = 56
"""Example ids are unique within a stream; the stream's number goes above this bit, so that streams draw apart."""
INPUT_SHIFT = 58
"""Two inputs of one example that are masked in one pass draw apart by a number above this bit."""


@dataclass(frozen=True)
class Randomness:
    """Keys of the Philox streams of one run."""

    seed: int

    def key(self, purpose: str) -> int:
        """The 64-bit key of a named purpose, such as ``"spans/masked_speech"``."""
        return stream_key(self.seed, zlib.crc32(purpose.encode()))
