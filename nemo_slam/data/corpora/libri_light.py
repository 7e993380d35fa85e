"""Libri-light: 60,000 hours of untranscribed English audiobooks, from a folder that is here already.

Each recording has its voice activity in a JSON file beside it; adjacent stretches of speech are joined to what one row
can hold.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from nemo_slam.data.corpora.files import CorpusError
from nemo_slam.data.corpora.layout import Row, prepare_once
from nemo_slam.data.corpora.parts import in_threads, need_folder, need_still, write_parts

VERSION = 1
PARTS = ("small", "medium", "large")
MOST_SECONDS = 30.0
LONGEST_GAP = 1.0
LICENCE = "public domain (LibriVox); Kahn et al., 2020"


def prepare(root: Path, source: Path, max_seconds: float | None = None) -> Path:
    """Writes ``train`` (everything) and a manifest a part, rows with ``offset`` and ``duration``, without text.

    Args:
        root: the corpus folder; the audio stays where it is.
        source: the folder that holds some of ``small``, ``medium`` and ``large``.
        max_seconds: of a row; None: 30, or what a finished corpus has.

    Raises:
        CorpusError: ``source`` holds none of them; ``root`` holds another corpus.
    """
    need_folder(source, "the folder that holds Libri-light's small, medium or large")
    present = [part for part in PARTS if (source / part).is_dir()]
    if not present:
        raise CorpusError(f"{source}: none of {', '.join(PARTS)} is there; expected Libri-light's folder (--source)")
    if max_seconds is not None and not 1 <= max_seconds <= 600:
        raise CorpusError(f"--max-seconds {max_seconds:g}: expected 1 to 600")
    request = {"source": str(source.resolve()), "parts": present, "max_seconds": max_seconds, "version": VERSION}

    def build() -> None:
        seconds = max_seconds or MOST_SECONDS
        about = {
            "name": "libri_light",
            "request": {**request, "max_seconds": seconds},
            "licences": {"speech": LICENCE},
        }
        left_out: Counter[str] = Counter()
        write_parts(root, about, _rows(source, present, seconds, left_out), left_out=left_out)

    return prepare_once(root, "libri_light", request, build)


def _rows(
    source: Path, present: list[str], seconds: float, left_out: Counter[str]
) -> Iterator[tuple[tuple[str, ...], Row]]:
    # Not lhotse's recipe: it holds all of 60,000 hours at once, more than most machines have, and looks for the
    # JSON of "flac/NAME.flac" in "json/NAME.json".
    import soundfile

    def read(path: Path):
        try:
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            duration = soundfile.info(path).duration
            stretches = [(float(start), min(float(end), duration)) for start, end in about["voice_activity"]]
            return path, (about["speaker"], stretches)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            return path, error

    good = None
    for part in present:
        for path, found in in_threads(read, sorted((source / part).rglob("*.flac"))):
            if isinstance(found, Exception):
                left_out[f"recording or its JSON cannot be read ({type(found).__name__})"] += 1
                continue
            good = good or path
            speaker, stretches = found
            name = str(path.relative_to(source).with_suffix(""))
            for start, end in windows(stretches, seconds):
                row = {"audio_filepath": str(path.resolve()), "offset": start, "duration": end - start, "lang": "en"}
                yield ("train", part), {**row, "speaker": speaker, "id": name}
    if left_out:
        need_still(good)


def windows(stretches: Sequence[tuple[float, float]], seconds: float) -> Iterator[tuple[float, float]]:
    """Joins neighbouring stretches (start, end) to at most ``seconds``, and cuts longer ones evenly.

    >>> list(windows([(0.0, 4.0), (4.5, 9.0), (12.0, 33.0)], 10.0))
    [(0.0, 9.0), (12.0, 19.0), (19.0, 26.0), (26.0, 33.0)]
    """
    joined: list[tuple[float, float]] = []
    for start, stop in sorted(stretches):
        if stop <= start:
            continue
        if joined and stop - joined[-1][0] <= seconds and start - joined[-1][1] <= LONGEST_GAP:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    for start, stop in joined:
        yield from _cut(start, stop, seconds)


def _cut(start: float, end: float, seconds: float) -> Iterator[tuple[float, float]]:
    pieces = max(1, -(-round((end - start) * 1000) // round(seconds * 1000)))
    edges = [round(start + (end - start) * k / pieces, 3) for k in range(pieces + 1)]
    yield from pairwise(edges)
