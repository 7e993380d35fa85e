"""The speech stream: utterances without text."""

from __future__ import annotations

import numpy as np
import torch

from nemo_slam.data.audio_rows import COLUMNS, TAR_COLUMNS, AudioRows, scan_audio_rows
from nemo_slam.data.bad_rows import BadRows
from nemo_slam.data.batch import SpeechBatch
from nemo_slam.data.config import SpeechConfig
from nemo_slam.data.index import IndexBuilder, open_index
from nemo_slam.data.manifest import expand_paths, expand_sources
from nemo_slam.data.sampling import PURPOSE_SPEECH
from nemo_slam.data.stream import Stream
from nemo_slam.data.tar import TarMembers, identity


class SpeechStream(Stream):
    """Batches of utterances.

    Args:
        config: see `SpeechConfig`.
        seed: of the order.
        bad_rows: where unusable rows are listed.
        name: for messages.

    >>> stream = SpeechStream(SpeechConfig(["train.json"], frames_per_step=2000), seed=1)  # doctest: +SKIP
    >>> stream.batch(step=0, part=0, parts=1).audio.shape  # doctest: +SKIP
    torch.Size([9, 63040])
    """

    def __init__(self, config: SpeechConfig, *, seed: int, bad_rows: BadRows | None = None, name: str = "speech"):
        self.config = config
        self.sources = expand_paths(config.manifest_filepath)
        tars = None if config.tarred_audio_filepaths is None else expand_sources(config.tarred_audio_filepaths)

        def scan(builder: IndexBuilder) -> None:
            members = None if tars is None else TarMembers(tars)
            for chunk in scan_audio_rows(builder, self.sources, config, False, members):
                for _, values in chunk:
                    builder.add(*values)

        index = open_index(
            "speech",
            [*self.sources, *(tars or [])],
            {"durations": [config.min_duration, config.max_duration], "tars": identity(tars)},
            COLUMNS if tars is None else COLUMNS | TAR_COLUMNS,
            scan,
            config.cache_dir,
        )
        sampling = {
            "frames_per_step": config.frames_per_step,
            "seed": seed,
            "purpose": PURPOSE_SPEECH,
            "window": config.window,
        }
        super().__init__(name, index, sampling, bad_rows or BadRows())
        self._audio = AudioRows(self, self.sources, tars)

    def load(self, ids: np.ndarray, epochs: np.ndarray, step: int | None = None) -> SpeechBatch:
        """The batch of the given examples, (B,) each; those that cannot be loaded are left out and listed."""
        kept, audio, lengths = self._audio.load(ids, step)
        return SpeechBatch(
            audio=audio,
            audio_lengths=lengths,
            ids=torch.from_numpy(ids[kept]),
            epochs=torch.from_numpy(epochs[kept]),
        )
