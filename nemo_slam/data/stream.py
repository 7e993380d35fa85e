"""What the three streams have in common: an index, a sampler, and an account of what was left out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from nemo_slam.data.bad_rows import BadRow, BadRows, EmptyStreamError
from nemo_slam.data.index import Index
from nemo_slam.data.sampling import StepSampler

logger = logging.getLogger(__name__)

_LISTED = 1000  # of a stream of nothing but bad rows, which may be millions


class Stream:
    """A stream of batches addressed by step.

    Attributes:
        name: for messages and `bad_rows.jsonl`.
        index: what the corpus holds; `index.meta["digest"]` tells whether it is the same as before.
        sampler: which examples form which batch.
        bad_rows: where unusable rows are listed.
    """

    unit = "frames"
    sources: list[Path]  # set by each stream, in the order of the index's `file` column

    def __init__(self, name: str, index: Index, sampler_args: dict[str, Any], bad_rows: BadRows):
        self.name, self.index, self.bad_rows = name, index, bad_rows
        refused = index.bad_rows(None if len(index) else _LISTED)
        bad_rows.record_all(name, refused)
        if len(index) == 0:
            listed = "listed" if index.meta["bad"] <= _LISTED else f"{_LISTED:,} of them listed"
            bad = f", {listed} in {bad_rows.where}, the first: {refused[0]}" if refused else ""
            raise EmptyStreamError(
                f"stream {name!r} is empty: no row is left ({self._left_out()}{bad}). "
                "Check the paths, and the limits on duration or tokens"
            )
        self.sampler = StepSampler(index, **sampler_args)
        logger.info("stream %r: %s", name, self.summary())

    def batch(self, step: int, part: int = 0, parts: int = 1, once: bool = False):
        """One share of the global batch `step`.

        Args:
            step: the optimizer step.
            part: which share, 0 .. parts - 1.
            parts: ranks times micro-batches.
            once: cover epoch 0 and then give empty batches, instead of going round.
        """
        ids, epochs = self.sampler.part(step, part, parts, once)
        return self.load(ids, epochs, step)

    def load(self, ids: np.ndarray, epochs: np.ndarray, step: int | None = None):
        """The batch of the given examples, (B,) ids and epochs. `step` is noted beside a bad row."""
        raise NotImplementedError

    def where(self, example_id: int) -> tuple[str, int]:
        """The file and the line (from 1) that an example comes from."""
        return str(self.sources[self.index.file[example_id]]), int(self.index.line[example_id])

    def summary(self) -> str:
        """Rows, amount, length of an epoch, and what was left out and why, in a sentence."""
        size = self.index.meta["total_length"]
        amount = f"{size / 360_000:.2f} h" if self.unit == "frames" else f"{size:,} {self.unit}"
        return (
            f"{len(self.index):,} rows, {amount}, {self.sampler.steps_per_epoch:.1f} steps a pass; {self._left_out()}"
        )

    def _left_out(self) -> str:
        filtered = [f"{count:,} {reason}" for reason, count in sorted(self.index.meta["filtered"].items())]
        return f"filtered: {', '.join(filtered) or 'none'}; bad: {self.index.meta['bad']:,}"

    def _bad_row(self, example_id: int, reason: str, step: int | None) -> None:
        file, line = self.where(example_id)
        self.bad_rows.record(self.name, BadRow(file, line, reason), step)
