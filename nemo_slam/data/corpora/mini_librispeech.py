"""Mini LibriSpeech (OpenSLR 31): five hours of read English to train on, two to test on, through lhotse.

Its `dev-clean-2` becomes dev and test, divided by speaker; the text stream is the training transcripts.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from typing import Any

from nemo_slam.data.corpora.apt import WAYS_OUT
from nemo_slam.data.corpora.files import CorpusError
from nemo_slam.data.corpora.layout import SPLITS, Row, finish, prepare_once
from nemo_slam.data.corpora.librispeech import read_part
from nemo_slam.data.corpora.normalise import normalise
from nemo_slam.data.corpora.splits import pick

VERSION = 1
_PARTS = {"train-clean-5": {"train": 1.0}, "dev-clean-2": {"dev": 0.5, "test": 0.5}}


def prepare(root: Path, source: Path | None = None) -> Path:
    """Prepares the corpus below ``root``; returns at once if it is there already.

    Args:
        root: the corpus folder.
        source: a `LibriSpeech` folder that holds train-clean-5 and dev-clean-2 already. None: download it below
            ``root``, unless a finished corpus is there.

    Raises:
        CorpusError: the download failed, or ``source`` lacks a part; or ``root`` holds another corpus.
    """
    request = {"source": str(source.resolve()) if source else None, "version": VERSION}
    return prepare_once(root, "mini_librispeech", request, lambda: _build(root, source, request))


def _build(root: Path, source: Path | None, request: dict[str, Any]) -> None:
    from lhotse.recipes import download_librispeech

    downloaded = source is None
    if source is None:
        try:
            source = download_librispeech(root, dataset_parts="mini_librispeech")
        except (OSError, HTTPException) as error:
            raise CorpusError(f"mini LibriSpeech cannot be downloaded: {error}\n{WAYS_OUT}") from error
        except (EOFError, tarfile.TarError, zlib.error) as error:
            raise CorpusError(
                f"mini LibriSpeech: a download was cut off or is damaged ({error}). The same command goes on with it; "
                f"if that fails too, delete {root}/*.tar.gz first"
            ) from error
    absent = [part for part in _PARTS if not (source / part).is_dir()]
    if absent:
        raise CorpusError(f"{source}: no folder {' and no folder '.join(absent)}; expected both parts of OpenSLR 31")
    parts = {part: read_part(source, part) for part in _PARTS}
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    left_out: Counter[str] = Counter()
    for part, shares in _PARTS.items():
        recordings = parts[part]["recordings"]
        for segment in sorted(parts[part]["supervisions"], key=lambda segment: segment.id):
            text = normalise(segment.text, "en")
            if text is None:
                left_out["no words"] += 1
                continue
            split = pick(f"mini_librispeech:{segment.speaker}", shares)
            rows[split].append(_row(root, recordings[segment.recording_id], segment, text))
    if empty := [split for split in SPLITS if not rows[split]]:
        raise CorpusError(f"{source}: no utterances for {', '.join(empty)}; is it all of OpenSLR 31?")
    about = {
        "name": "mini_librispeech",
        "request": request,
        "synthetic": False,
        "licences": {"speech and text": "CC-BY-4.0, Vassil Panayotov and Daniel Povey; OpenSLR 31"},
        "left_out": {"en": dict(left_out)},
    }
    finish(root, {"en": rows}, [row["text"] for row in rows["train"]], about, Counter())
    if downloaded:
        for part in _PARTS:
            (root / f"{part}.tar.gz").unlink(missing_ok=True)


def _row(root: Path, recording, segment, text: str) -> Row:
    audio = Path(recording.sources[0].source).resolve()
    manifests = (root / "manifests").resolve()
    inside = audio.is_relative_to(root.resolve())
    return {
        "audio_filepath": os.path.relpath(audio, manifests) if inside else str(audio),
        "duration": recording.duration,
        "text": text,
        "lang": "en",
        "prompt_id": segment.id,
        "speaker": segment.speaker,
    }
