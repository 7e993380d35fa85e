"""Any corpus that lhotse has a recipe for: its recordings and supervisions as a NeMo manifest.

A channel of a recording with several (telephone calls, microphone arrays) is written out, since a manifest's row names
a file, and files of several channels are averaged on reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from nemo_slam.data.corpora.files import SAMPLE_RATE, CorpusError, whole_file
from nemo_slam.data.corpora.layout import Row, prepare_once
from nemo_slam.data.corpora.parts import write_parts

VERSION = 1


def prepare(
    root: Path, recordings: Path, supervisions: Path, part: str = "train", lang: str | None = None, lower: bool = False
) -> Path:
    """Writes ``manifests/PART.json``.

    Args:
        root: the corpus folder.
        recordings, supervisions: what ``lhotse prepare CORPUS`` wrote: ``*_recordings_*.jsonl.gz`` and
            ``*_supervisions_*.jsonl.gz`` of one part.
        part: names the manifest.
        lang: the rows' ``lang``; None: the supervisions' own.
        lower: write the texts in lower case.

    Raises:
        CorpusError: a file is missing; ``root`` holds another corpus.
    """
    for path in (recordings, supervisions):
        if not path.is_file():
            raise CorpusError(f"{path} does not exist: `lhotse prepare CORPUS SOURCE FOLDER` writes it")
    request = {"recordings": str(recordings.resolve()), "supervisions": str(supervisions.resolve()), "part": part}
    request |= {"lang": str(lang), "lower": str(lower), "version": str(VERSION)}

    def build() -> None:
        left_out: Counter[str] = Counter()
        about = {"name": "lhotse", "request": request, "licences": {"speech and text": "the corpus's own"}}
        rows = _rows(root, recordings, supervisions, lang, lower, left_out)
        write_parts(root, about, (((part,), row) for row in rows), left_out=left_out)

    return prepare_once(root, "lhotse", request, build)


def _rows(
    root: Path, recordings: Path, supervisions: Path, lang: str | None, lower: bool, left_out: Counter[str]
) -> Iterator[Row]:
    from lhotse import RecordingSet, SupervisionSet

    known = RecordingSet.from_file(recordings)
    by_id = {recording.id: recording for recording in known}
    files: dict[tuple[str, int], str] = {}
    for segment in SupervisionSet.from_file(supervisions):
        recording = by_id.get(segment.recording_id)
        text = " ".join((segment.text or "").split())
        if recording is None or not text:
            left_out["no text" if recording is not None else "no such recording"] += 1
            continue
        channels = segment.channel if isinstance(segment.channel, list) else [segment.channel]
        key = (recording.id, channels[0])
        if key not in files:
            files[key] = _audio(root, recording, channels[0])
        start = max(segment.start, 0.0)
        row: Row = {
            "audio_filepath": files[key],
            "offset": round(start, 4),
            "duration": round(min(segment.end, recording.duration) - start, 4),
            "text": text.lower() if lower else text,
            "id": segment.id,
        }
        if language := lang or segment.language:
            row["lang"] = language
        if segment.speaker:
            row["speaker"] = segment.speaker
        yield row


def _audio(root: Path, recording, channel: int) -> str:
    """The path of one channel, written out if the file holds others or is no plain file."""
    source = recording.sources[0]
    if recording.num_channels == 1 and source.type == "file" and not recording.transforms:
        return str(Path(source.source).resolve())
    import soundfile

    samples = recording.resample(SAMPLE_RATE).load_audio(channels=channel)[0]
    name = f"{quote(recording.id, safe='')}_{channel}.flac"  # an id may hold slashes
    with whole_file(root / "audio" / name) as temporary, temporary.open("wb") as file:
        soundfile.write(file, samples, SAMPLE_RATE, format="FLAC")
    return f"../audio/{name}"
