"""The audio side of the speech and pair streams: scanning manifests into an index, and loading rows of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from nemo_slam.data.audio import AudioError, load_audio
from nemo_slam.data.bad_rows import BadRow, DataError, EmptyStreamError
from nemo_slam.data.config import PairsConfig, SpeechConfig
from nemo_slam.data.index import IndexBuilder
from nemo_slam.data.manifest import Files, Row, RowError, audio_path, parse_row, scan_lines
from nemo_slam.data.remote import Source
from nemo_slam.data.stream import Stream
from nemo_slam.data.tar import TarMembers

# Where a row is: number of its manifest, line, byte offset and size there.
COLUMNS = {"length": "<i4", "file": "<i4", "line": "<i4", "offset": "<i8", "nbytes": "<i4"}
# Where its audio is, if in tar files: number of the tar file, byte offset and size there.
TAR_COLUMNS = {"tar": "<i4", "tar_offset": "<i8", "tar_nbytes": "<i8"}

_CHUNK = 4096
_PROBED = 1024


def frames(duration: float) -> int:
    """Length in frames of 10 ms, at least 1."""
    return max(1, round(duration * 100))


def scan_audio_rows(
    builder: IndexBuilder,
    manifests: Sequence[Path],
    config: SpeechConfig | PairsConfig,
    need_text: bool,
    tars: TarMembers | None,
) -> Iterator[list[tuple[Row, tuple]]]:
    """Goes through manifests and hands on chunks of usable rows, each with its values of COLUMNS (and TAR_COLUMNS).

    Bad rows and rows outside the duration limits go to the builder. A chunk never crosses a manifest.
    """
    too_short = f"shorter than {config.min_duration:g} s"
    too_long = f"longer than {config.max_duration:g} s"
    for number, manifest in enumerate(manifests):
        chunk: list[tuple[Row, tuple]] = []
        for line, offset, raw in scan_lines(manifest):
            if raw.isspace():
                continue
            try:
                row = parse_row(raw, need_text)
                outside = too_short if row.duration < config.min_duration else too_long
                if not config.min_duration <= row.duration <= config.max_duration:
                    builder.filtered[outside] += 1
                    if tars is not None:
                        with suppress(RowError):
                            tars.find(row)  # its member is no other row's all the same
                    continue
                place = tars.find(row) if tars is not None else ()
            except RowError as error:
                builder.add_bad(BadRow(str(manifest), line, str(error)))
                continue
            chunk.append((row, (frames(row.duration), number, line, offset, len(raw), *place)))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
        builder.end_source()


class AudioRows:
    """Loads the audio of a stream's rows; what cannot be loaded becomes a bad row.

    Args:
        stream: whose rows.
        manifests: in the order of the index's `file` column.
        tars: in the order of its `tar` column, or None where audio lies in plain files.
    """

    def __init__(self, stream: Stream, manifests: Sequence[Path], tars: Sequence[Source] | None):
        self._stream = stream
        self._manifests = Files(manifests)
        self._tars = None if tars is None else Files(tars)

    def load(self, ids: np.ndarray, step: int | None) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """Audio of the examples that can be loaded, sorted by length.

        Returns:
            Positions within `ids` of what was loaded, (B,) int64, ties in the order of `ids`; audio (B, T) float32,
            zero-padded; lengths (B,) int64 in samples.
        """
        loaded = [(position, audio) for position, i in enumerate(ids) if (audio := self._load_one(i, step)) is not None]
        if len(ids) and not loaded:
            self._probe(step)
        loaded.sort(key=lambda item: len(item[1]))
        lengths = torch.tensor([len(audio) for _, audio in loaded], dtype=torch.int64)
        padded = torch.zeros(len(loaded), int(lengths[-1]) if loaded else 0)
        for row, (_, samples) in zip(padded, loaded, strict=True):
            row[: len(samples)] = torch.from_numpy(samples)
        return np.array([position for position, _ in loaded], np.int64), padded, lengths

    def _load_one(self, example_id: int, step: int | None) -> np.ndarray | None:
        try:
            return self.read(example_id)
        except (RowError, AudioError) as error:
            reason = str(error)
        except OSError as error:
            what = f"{error.filename}: cannot be opened" if error.filename else "cannot be read"
            reason = f"{what} ({error.strerror or error})"
        self._stream._bad_row(example_id, reason, step)
        return None

    def read(self, example_id: int) -> np.ndarray:
        """Audio of one example, (T,) float32. Raises RowError, AudioError or OSError."""
        index = self._stream.index
        number = int(index.file[example_id])
        if not 0 <= number < len(self._manifests.paths):
            raise DataError(f"the index {index.folder} is damaged: delete it, and it is built anew")
        raw = self._manifests.read(number, int(index.offset[example_id]), int(index.nbytes[example_id]))
        row = parse_row(raw, need_text=False)
        if frames(row.duration) != index.length[example_id]:
            raise RowError("the manifest was changed while in use: start again, and its index is built anew")
        if self._tars is None:
            path = audio_path(Path(self._manifests.paths[number]), row)
            return load_audio(path, offset=row.offset, duration=row.duration)
        tar = int(index.tar[example_id])
        name = f"{self._tars.paths[tar]}:{row.audio_filepath}"
        size = int(index.tar_nbytes[example_id])
        blob = self._tars.read(tar, int(index.tar_offset[example_id]), size)
        if len(blob) < size:
            raise AudioError(f"{name}: the tar file ends {size - len(blob)} bytes early")
        return load_audio(blob, offset=row.offset, duration=row.duration, name=name)

    def _probe(self, step: int | None) -> None:
        """After a batch of nothing but bad rows: is there a good one at all?

        A file system that is gone, at the start or in the middle of a run, must not pass for so many bad rows.
        """
        rows = len(self._stream.index)
        for example_id in np.unique(np.linspace(0, rows - 1, _PROBED).astype(np.int64)):
            if self._load_one(example_id, step) is not None:
                return
        tried = f"all {rows}" if rows <= _PROBED else f"{_PROBED} of {rows}, evenly spread,"
        raise EmptyStreamError(
            f"stream {self._stream.name!r}: every row tried is bad ({tried} rows); the reasons are in "
            f"{self._stream.bad_rows.where}. Check that the audio lies where the manifest says, and that its file "
            "system is still there; the same command goes on from the last checkpoint"
        )
