"""Which examples form batch k of a stream: a pure function of (seed, purpose, k), never a state.

A stream is the endless concatenation of its epochs. In epoch e the shards of the index are permuted, `window`
consecutive permuted shards form a window, and the examples of a window are permuted. Along that order each example
has a start: the total length of everything before it. Batch k holds the examples whose start lies in [k*F, (k+1)*F),
where F is the stream's budget for one optimizer step. So an epoch has a fixed length, batch k is found without
visiting batch k - 1, every example occurs exactly once an epoch, and the number of ranks or workers does not matter.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np

_MASK64 = (1 << 64) - 1
_SHARD_ORDER, _WINDOW_ORDER = 1, 2
_CACHED_WINDOWS = 8

# One number per use of randomness, so that no two uses share a sequence.
PURPOSE_SPEECH, PURPOSE_TEXT, PURPOSE_PAIRS, PURPOSE_NEGATIVES = 1, 2, 3, 4


class Lengths(Protocol):
    """What the sampler reads of an index: S shards over n examples, each shard a range of example ids.

    *Shape:*
        - lengths: (n,) integers >= 1
        - shard_offsets: (S + 1,) int64; shard s holds the ids shard_offsets[s] .. shard_offsets[s + 1] - 1
        - shard_lengths: (S,) int64, the sum of `lengths` over each shard
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def shard_offsets(self) -> np.ndarray: ...

    @property
    def shard_lengths(self) -> np.ndarray: ...


def keyed_permutation(n: int, *, seed: int, purpose: int, use: int, epoch: int, block: int) -> np.ndarray:
    """A permutation of 0..n-1 that depends on nothing but its arguments.

    It sorts raw Philox words, because NumPy keeps bit generators stable between versions but not
    `Generator.permutation`. *Shape:* (n,) int64.
    """
    generator = np.random.Philox(key=[seed & _MASK64, purpose & _MASK64], counter=[0, use, epoch, block])
    return np.argsort(generator.random_raw(n), kind="stable")


def keyed_words(ids: np.ndarray, epochs: np.ndarray, *, seed: int, purpose: int, draw: int = 0) -> np.ndarray:
    """One 64-bit random word for each (id, epoch), by chained splitmix64 steps. *Shape:* (B,) uint64."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    state = mix(np.full(len(ids), seed & _MASK64, dtype=np.uint64))
    for word in (np.uint64(purpose), np.asarray(epochs, np.uint64), np.asarray(ids, np.uint64), np.uint64(draw)):
        state = mix(state ^ word)
    return state


class StepSampler:
    """The examples of each step of one stream, and of each part of a step.

    Args:
        index: lengths and shards, see `Lengths`.
        frames_per_step: F, the stream's budget for a global batch, in the unit of `index.lengths`.
        seed: the run's seed.
        purpose: one of the PURPOSE_* numbers; two streams with the same purpose and seed would be ordered alike.
        window: number of consecutive permuted shards whose examples are mixed.

    >>> from types import SimpleNamespace
    >>> lengths = np.array([3, 2, 4])
    >>> index = SimpleNamespace(lengths=lengths, shard_offsets=np.array([0, 3]), shard_lengths=np.array([9]))
    >>> sampler = StepSampler(index, frames_per_step=9, seed=0, purpose=PURPOSE_TEXT)
    >>> ids, epochs = sampler.global_batch(7)  # F = one epoch, so step 7 is epoch 7
    >>> sorted(ids.tolist()), epochs.tolist()
    ([0, 1, 2], [7, 7, 7])
    """

    def __init__(self, index: Lengths, frames_per_step: int, seed: int, purpose: int, window: int = 16):
        if frames_per_step < 1 or window < 1:
            raise ValueError(f"frames_per_step ({frames_per_step}) and window ({window}) must be at least 1")
        self.index = index
        self.frames_per_step = int(frames_per_step)
        self.seed, self.purpose, self.window = int(seed), int(purpose), int(window)
        self.examples_per_epoch = int(index.shard_offsets[-1])
        self.length_per_epoch = int(index.shard_lengths.sum())
        if self.examples_per_epoch < 1:
            raise ValueError("the index holds no example: nothing to sample from")
        if int(index.shard_lengths.min()) < 1:
            raise ValueError("the index holds an empty shard: every shard must have a positive total length")
        self._cache: OrderedDict[tuple, tuple] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": OrderedDict()}

    @property
    def steps_per_epoch(self) -> float:
        """Steps that one pass over the stream takes."""
        return self.length_per_epoch / self.frames_per_step

    @property
    def steps_once(self) -> int:
        """Steps that cover epoch 0 completely (the last one may be short)."""
        return -(-self.length_per_epoch // self.frames_per_step)

    def global_batch(self, step: int, once: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """All examples of `step`, over all ranks, in stream order.

        Args:
            step: 0 or more.
            once: stop after epoch 0 instead of beginning the next one (for validation).

        Returns:
            ids (B,) int64 and epochs (B,) int64. The total length is below F plus the longest example. B may be 0,
            where one example is longer than F.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        begin = step * self.frames_per_step
        end = begin + self.frames_per_step
        ids, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        last = 0 if once else (end - 1) // self.length_per_epoch
        for epoch in range(begin // self.length_per_epoch, last + 1):
            base = epoch * self.length_per_epoch
            found = self._between(epoch, max(begin - base, 0), min(end - base, self.length_per_epoch))
            ids.append(found)
            epochs.append(np.full(len(found), epoch, np.int64))
        return np.concatenate(ids), np.concatenate(epochs)

    def part(self, step: int, part: int, parts: int, once: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """One of `parts` shares of the step: the batch sorted by length, cut at equal cumulative length.

        An example belongs to the part in which its middle lies. Returns ids and epochs, (b,) int64, shortest first,
        ties by id, then epoch.
        """
        if not 0 <= part < parts:
            raise ValueError(f"part must be in 0..{parts - 1}, got {part}")
        return split_batch(*self.global_batch(step, once), self.index.lengths, part, parts)

    def _between(self, epoch: int, low: int, high: int) -> np.ndarray:
        """Ids of the epoch whose start lies in [low, high), in order."""
        _, window_starts = self._epoch(epoch)
        first = int(np.searchsorted(window_starts, low, side="right")) - 1
        last = int(np.searchsorted(window_starts, high, side="left"))
        found = [np.zeros(0, np.int64)]
        for window in range(first, min(last, len(window_starts) - 1)):
            order, starts = self._window(epoch, window)
            found.append(order[np.searchsorted(starts, low) : np.searchsorted(starts, high)])
        return np.concatenate(found)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard order (S,) and the start of each window plus the total (windows + 1,)."""

        def compute() -> tuple[np.ndarray, np.ndarray]:
            shards = keyed_permutation(
                len(self.index.shard_lengths),
                seed=self.seed,
                purpose=self.purpose,
                use=_SHARD_ORDER,
                epoch=epoch,
                block=0,
            )
            sizes = np.add.reduceat(self.index.shard_lengths[shards], np.arange(0, len(shards), self.window))
            return shards, np.concatenate([[0], np.cumsum(sizes)])

        return self._remember((epoch,), compute)

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The window's ids in order (n,) and their starts within the epoch (n,)."""

        def compute() -> tuple[np.ndarray, np.ndarray]:
            shards, window_starts = self._epoch(epoch)
            offsets = self.index.shard_offsets
            ids = np.concatenate(
                [
                    np.arange(offsets[s], offsets[s + 1])
                    for s in shards[window * self.window : (window + 1) * self.window]
                ]
            )
            order = keyed_permutation(
                len(ids), seed=self.seed, purpose=self.purpose, use=_WINDOW_ORDER, epoch=epoch, block=window
            )
            ids = ids[order]
            ends = np.cumsum(self.index.lengths[ids], dtype=np.int64)
            return ids, window_starts[window] + np.concatenate([[0], ends[:-1]])

        return self._remember((epoch, window), compute)

    def _remember(self, key: tuple, compute):
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        value = self._cache[key] = compute()
        while len(self._cache) > _CACHED_WINDOWS:
            self._cache.popitem(last=False)
        return value


def split_batch(
    ids: np.ndarray, epochs: np.ndarray, lengths: np.ndarray, part: int, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The share `part` of `parts` of a batch: sorted by length (ties by id, then epoch), cut at equal total length.

    *Shape:* ids, epochs (B,); lengths (n,), indexed by id. Returns ids and epochs (b,).
    """
    size = np.asarray(lengths[ids], np.int64)
    order = np.lexsort((epochs, ids, size))
    size = size[order]
    ends = np.cumsum(size)
    if len(ends) == 0:
        return ids, epochs
    # Twice the middle over twice the total, in integers: exact, and below `parts` because lengths are positive.
    owner = (2 * ends - size) * parts // (2 * ends[-1])
    chosen = order[owner == part]
    return ids[chosen], epochs[chosen]
