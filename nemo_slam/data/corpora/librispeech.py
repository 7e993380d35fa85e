"""LibriSpeech (OpenSLR 12), 960 hours of read English, from a folder that is here already, through lhotse."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nemo_slam.data.corpora.files import CorpusError
from nemo_slam.data.corpora.layout import Row, logger, prepare_once
from nemo_slam.data.corpora.normalise import normalise
from nemo_slam.data.corpora.parts import need_folder, write_parts

VERSION = 1
UTTERANCES = {
    "train-clean-100": 28_539,
    "train-clean-360": 104_014,
    "train-other-500": 148_688,
    "dev-clean": 2_703,
    "dev-other": 2_864,
    "test-clean": 2_620,
    "test-other": 2_939,
}
TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")
PARTS = tuple(UTTERANCES)
LICENCE = "CC-BY-4.0, Vassil Panayotov, Guoguo Chen, Daniel Povey, Sanjeev Khudanpur; OpenSLR 12"


def prepare(root: Path, source: Path) -> Path:
    """Writes a manifest a part (``train_clean_100``, ...), ``train`` (all training parts) and ``dev`` (both).

    Args:
        root: the corpus folder; the audio stays where it is.
        source: the `LibriSpeech` folder, with some of PARTS in it. Those that are missing are named.

    Raises:
        CorpusError: ``source`` holds none of them, or no training part; ``root`` holds another corpus.
    """
    need_folder(source, "the LibriSpeech folder of OpenSLR 12")
    present = [part for part in PARTS if (source / part).is_dir()]
    if not set(TRAIN) & set(present):
        raise CorpusError(f"{source}: none of {', '.join(TRAIN)} is there; expected the LibriSpeech folder (--source)")
    request = {"source": str(source.resolve()), "parts": present, "version": VERSION}
    return prepare_once(root, "librispeech", request, lambda: _build(root, source, present, request))


def _build(root: Path, source: Path, present: list[str], request: dict) -> None:
    if missing := [part for part in PARTS if part not in present]:
        logger.warning("%s lacks %s: the manifests do too", source, ", ".join(missing))
    left_out: Counter[str] = Counter()
    about = {"name": "librispeech", "request": request, "licences": {"speech and text": LICENCE}}
    write_parts(root, about, _rows(source, present, left_out), left_out=left_out)


def read_part(source: Path, part: str) -> dict:
    """What lhotse finds in a part's folder: ``recordings`` and ``supervisions``.

    Raises:
        CorpusError: nothing is there, or a file cannot be read, as where unpacking was cut off.
    """
    from lhotse.audio.utils import AudioLoadingError
    from lhotse.recipes import prepare_librispeech

    try:
        found = prepare_librispeech(source, dataset_parts=[part], num_jobs=os.cpu_count() or 1)[part]
    except (AssertionError, AudioLoadingError, OSError, RuntimeError, ValueError) as error:
        raise CorpusError(f"{source / part} cannot be read ({error}). Is it unpacked completely?") from error
    if (count := len(found["supervisions"])) < UTTERANCES.get(part, 0):
        logger.warning(
            "%s holds %d of %d utterances. If unpacking it was cut off, do it again, then delete corpus.json and "
            "prepare the corpus again",
            source / part,
            count,
            UTTERANCES[part],
        )
    return found


def _rows(source: Path, present: list[str], left_out: Counter[str]) -> Iterator[tuple[tuple[str, ...], Row]]:
    for part in present:
        found = read_part(source, part)
        names = (part.replace("-", "_"), *(group for group in ("train", "dev") if part.startswith(group)))
        for segment in sorted(found["supervisions"], key=lambda segment: segment.id):
            text = normalise(segment.text, "en")
            if text is None:
                left_out["no words, or digits"] += 1
                continue
            recording = found["recordings"][segment.recording_id]
            yield (
                names,
                {
                    "audio_filepath": str(Path(recording.sources[0].source).resolve()),
                    "duration": recording.duration,
                    "text": text,
                    "lang": "en",
                    "speaker": segment.speaker,
                    "id": segment.id,
                },
            )
