"""Transcripts of files, folders and manifests by any stock NeMo speech model; ``scripts/transcribe.py`` calls this.

Audio is read here rather than by the model: any rate and channel count, errors that name the file, and no padding of
short utterances.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_slam.data.audio import SAMPLE_RATE, AudioError, check_sample_rate, load_audio
from nemo_slam.data.manifest import RowError, duration_of, offset_of, parse_json, scan_lines, string_value

if TYPE_CHECKING:
    from nemo.collections.asr.models import ASRModel

    from nemo_slam.finetuning.text_model import TextModel

TEXT_MODELS = "nemo_slam.finetuning."
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".sph"})
MANIFEST_SUFFIXES = frozenset({".json", ".jsonl"})
SHORTEST = SAMPLE_RATE // 50
"""Samples of two feature frames: NeMo's normalisation is an error on one, where there is a GPU."""
_OF_AUDIO = frozenset({"audio_filepath", "offset", "duration"})  # of a manifest's row; all other keys are kept
_WINDOW = 512  # utterances that are sorted by length together
_WINDOW_SECONDS = 3600.0  # of audio that is held in memory, or a recording if that is longer


@dataclass
class Item:
    """One utterance to transcribe.

    Attributes:
        source: for messages: the path, or manifest and line.
        problem: why it cannot be transcribed, once that is known.
        row: what the output line holds.
    """

    source: str
    path: Path
    offset: float = 0.0
    duration: float | None = None
    row: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def find_items(inputs: Iterable[str | Path]) -> Iterator[Item]:
    """Utterances of audio files, folders (searched through) and NeMo manifests, in order.

    An input that does not exist, a folder without audio and a bad manifest row come as items with a problem.
    """
    for given in map(Path, inputs):
        if given.is_dir():
            files = sorted(p for p in given.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
            if not files:
                known = ", ".join(sorted(AUDIO_SUFFIXES))
                yield Item(str(given), given, problem=f"{given}: no audio in this folder (looked for {known})")
            yield from (Item(str(path), path) for path in files)
        elif given.suffix.lower() in MANIFEST_SUFFIXES and given.is_file():
            yield from _manifest_items(given)
        else:
            yield Item(str(given), given)


def _manifest_items(manifest: Path) -> Iterator[Item]:
    for number, _, raw in scan_lines(manifest):
        if raw.isspace():
            continue
        where = f"{manifest}:{number}"
        try:
            row = parse_json(raw)
            named = os.path.expanduser(string_value(row, "audio_filepath"))  # Path's own fails at an unknown ~user
            path = Path(os.path.normpath(manifest.parent / named))
            offset = offset_of(row)
            duration = None if row.get("duration") is None else duration_of(row)
        except RowError as error:
            yield Item(where, manifest, problem=f"{where}: {error}")
            continue
        kept = {"corpus": manifest.stem, **{key: value for key, value in row.items() if key not in _OF_AUDIO}}
        if offset:
            kept["offset"] = offset
        yield Item(where, path, offset, duration, kept)


def transcribe(
    model: ASRModel, items: Iterable[Item], batch_size: int = 8, chunk_seconds: float = 30.0
) -> Iterator[Item]:
    """Transcribe items and hand them on in order: ``row`` is filled, or ``problem`` says why not.

    Args:
        model: a restored NeMo model; it keeps its device.
        batch_size: utterances (or chunks of long ones) in a forward pass.
        chunk_seconds: longer audio is cut at quiet places into chunks of at most this, and the texts are joined.
    """
    window: list[tuple[Item, np.ndarray]] = []
    samples = 0
    for item in items:
        window.append((item, audio := _load(item)))
        samples += len(audio)
        if len(window) == _WINDOW or samples >= _WINDOW_SECONDS * SAMPLE_RATE:
            yield from _transcribe_window(model, window, batch_size, chunk_seconds)
            window, samples = [], 0
    yield from _transcribe_window(model, window, batch_size, chunk_seconds)


def _load(item: Item) -> np.ndarray:
    """The item's audio, (T,), and what its row says of it; none where there is a problem."""
    audio = np.zeros(0, np.float32)
    if item.problem is None:
        try:
            audio = load_audio(item.path, offset=item.offset, duration=item.duration)
        except AudioError as error:
            item.problem = str(error)
        else:
            duration = round(len(audio) / SAMPLE_RATE, 4)
            item.row = {"audio_filepath": str(item.path), "duration": duration, **item.row}
    return audio


def _transcribe_window(
    model: ASRModel, window: list[tuple[Item, np.ndarray]], batch_size: int, chunk_seconds: float
) -> list[Item]:
    items = [item for item, _ in window]
    chunks: list[tuple[int, np.ndarray]] = []
    for number, (item, audio) in enumerate(window):
        if item.problem is None:
            chunks += [(number, chunk) for chunk in cut(audio, chunk_seconds)]
    # What is too short for the features holds no word; it may be the rest of a recording that was cut.
    heard = [i for i, (_, chunk) in enumerate(chunks) if len(chunk) >= SHORTEST]
    order = sorted(heard, key=lambda i: len(chunks[i][1]))
    texts = [""] * len(chunks)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for place, text in zip(batch, _texts(model, [chunks[i][1] for i in batch]), strict=True):
            texts[place] = text
    parts: dict[int, list[str]] = {}
    for (number, _), text in zip(chunks, texts, strict=True):
        parts.setdefault(number, []).append(text)
    for number, found in parts.items():
        items[number].row["pred_text"] = " ".join(part for part in found if part)
    return items


def _texts(model: ASRModel, audio: Sequence[np.ndarray]) -> list[str]:
    from nemo.collections.asr.parts.mixins import TranscribeConfig

    config = TranscribeConfig(use_lhotse=False, batch_size=len(audio), num_workers=0, verbose=False)
    # Not a field of NeMo's dataclass, but read from it: arrays shorter than this would be padded with digital silence.
    config.pad_min_duration = 0.0
    found = [text for part in model.transcribe_generator(list(audio), config) for text in part]
    return [getattr(text, "text", text) for text in found]


def cut(audio: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Pieces of at most ``seconds``, cut at the quietest 20 ms of a piece's last quarter. *Shape:* (T,) -> pieces."""
    most, pieces = round(seconds * SAMPLE_RATE), []
    hop = SAMPLE_RATE // 50
    if most < 4 * hop:
        raise ValueError(f"chunks of {seconds:g} s are too short to cut audio into")
    while len(audio) > most:
        first = most * 3 // 4
        frames = audio[first : first + (most - first) // hop * hop].reshape(-1, hop)
        at = first + int(np.square(frames, dtype=np.float64).sum(axis=1).argmin()) * hop + hop // 2
        pieces.append(audio[:at])
        audio = audio[at:]
    return [*pieces, audio]


def restore(path: str | Path) -> ASRModel | TextModel:
    """A fine-tuned model from a ``.nemo``, on the GPU if there is one, ready to use.

    Raises:
        FileNotFoundError, ValueError: no such file; not a NeMo archive; not a model that transcribes speech of 16 kHz.
    """
    import torch
    from nemo.collections.asr.models import ASRModel
    from nemo.core.classes import ModelPT

    from nemo_slam.archive import read_config

    config = read_config(path)
    target = str(config.get("target"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if target.startswith(TEXT_MODELS):
        return ModelPT.restore_from(str(path), map_location=device).eval()
    if not target.startswith("nemo.collections.asr.models."):
        raise ValueError(
            f"{path} holds a {target}, which does not transcribe: fine-tune it with scripts/speech_finetune.py first"
        )
    rate = (config.get("preprocessor") or {}).get("sample_rate", SAMPLE_RATE)
    check_sample_rate(rate, f"{path}: preprocessor.sample_rate")
    return ASRModel.restore_from(str(path), map_location=device).eval()


def questions(model: ASRModel | TextModel, inputs: Iterable[str | Path]) -> Iterator[Item]:
    """What the inputs hold for the model to answer: utterances, or texts."""
    if type(model).__module__.startswith(TEXT_MODELS):
        from nemo_slam.evaluation.text_answers import find_texts

        return find_texts(inputs, list(model.cfg.text_keys))
    return find_items(inputs)


def answers(
    model: ASRModel | TextModel, inputs: Iterable[str | Path], batch_size: int = 8, chunk_seconds: float = 30.0
) -> Iterator[Item]:
    """Transcripts, translations or labels of everything that the inputs hold, by whatever the model reads."""
    items = questions(model, inputs)
    if type(model).__module__.startswith(TEXT_MODELS):
        from nemo_slam.evaluation.text_answers import answer

        return answer(model, items, batch_size)
    return transcribe(model, items, batch_size, chunk_seconds)


def write_line(item: Item) -> str:
    """An output line: the item's row as JSON."""
    # JSON may hold half a surrogate pair, as \udce9, and UTF-8 may not: it is written as JSON has it.
    return json.dumps(item.row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
