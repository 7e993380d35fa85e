"""Text alone, from files that are here already: the LibriSpeech language-model corpus, and mC4 as JSON-lines."""

from __future__ import annotations

import gzip
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nemo_slam.data.corpora.files import CorpusError
from nemo_slam.data.corpora.layout import prepare_once
from nemo_slam.data.corpora.parts import held_out, need_folder, write_parts

VERSION = 1
LM_NAMES = ("librispeech-lm-norm.txt.gz", "librispeech-lm-norm.txt")
MOST_FILES = 128
LM_DEV, MC4_DEV = 0.0002, 0.001
"""Share held out, of lines and of documents."""
MC4_SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
LICENCES = {
    "librispeech_lm": "public domain (Project Gutenberg); OpenSLR 11",
    "mc4": "ODC-BY (Allen Institute for AI), beside Common Crawl's terms of use",
}


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, or of one that gzip packed. What goes wrong where they are written is no error here."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}); is a download unfinished?") from error


def prepare_librispeech_lm(root: Path, source: Path) -> Path:
    """Writes ``text/train.txt`` and a small ``text/dev.txt``, a sentence a line, in lower case.

    Args:
        root: the corpus folder.
        source: ``librispeech-lm-norm.txt.gz`` of OpenSLR 11 (or without .gz), or its folder.

    Raises:
        CorpusError: the file is not there, or damaged.
    """
    files = [source / name for name in LM_NAMES] if source.is_dir() else [source]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise CorpusError(f"{source}: expected {LM_NAMES[0]} of OpenSLR 11, or the folder that holds it (--source)")
    request = {"source": str(path.resolve()), "version": VERSION}
    left_out: Counter[str] = Counter()

    def lines() -> Iterator[tuple[str, str]]:
        for raw in _lines(path):
            line = " ".join(raw.lower().split())
            if not line:
                left_out["empty line"] += 1
                continue
            yield "dev" if held_out(line, LM_DEV) else "train", line

    return _prepare(root, "librispeech_lm", request, lines(), left_out)


def prepare_mc4(root: Path, source: Path) -> Path:
    """Writes ``text/train_NNN.txt``, at most 128 files, and ``text/dev.txt``, a paragraph a line.

    The text stays as it is written, Unicode composed and runs of space made one; the paper does not say more [?].

    Args:
        root: the corpus folder.
        source: a folder of JSON-lines with ``text`` (``c4-en.tfrecord-00000-of-11264.json.gz``, ...).

    Raises:
        CorpusError: no such file, or one that is not such JSON.
    """
    need_folder(source, "a folder of mC4's JSON-lines")
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name.endswith(MC4_SUFFIXES))
    if not files:
        raise CorpusError(f"{source}: no file ends in {', '.join(MC4_SUFFIXES)} (--source)")
    request = {
        "source": str(source.resolve()),
        "files": [str(f.relative_to(source)) for f in files],
        "version": VERSION,
    }
    left_out: Counter[str] = Counter()

    def lines() -> Iterator[tuple[str, str]]:
        groups = min(len(files), MOST_FILES)
        for number, path in enumerate(files):
            for place, raw in enumerate(_lines(path), 1):
                text = _document(raw, path, place)
                name = "dev" if held_out(text, MC4_DEV) else f"train_{number * groups // len(files):03d}"
                for paragraph in text.splitlines():
                    line = " ".join(paragraph.split())
                    if line:
                        yield name, line
                    else:
                        left_out["empty paragraph"] += 1

    return _prepare(root, "mc4", request, lines(), left_out)


def _document(raw: str, path: Path, place: int) -> str:
    try:
        text = json.loads(raw)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorpusError(f"{path}:{place}: not a JSON object with the key 'text' ({error})") from None
    if not isinstance(text, str):
        raise CorpusError(f"{path}:{place}: 'text' must be a string, got {text!r:.60}")
    return unicodedata.normalize("NFC", text)


def _prepare(root: Path, name: str, request: dict, lines: Iterator[tuple[str, str]], left_out: Counter[str]) -> Path:
    about = {"name": name, "request": request, "licences": {"text": LICENCES[name]}}
    return prepare_once(root, name, request, lambda: write_parts(root, about, lines=lines, left_out=left_out))
