"""CoVoST 2: translations of Common Voice 4.0, from folders that are here already. lhotse has no recipe for it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_slam.data.corpora.files import CorpusError
from nemo_slam.data.corpora.layout import Row, prepare_once
from nemo_slam.data.corpora.parts import in_threads, need_folder, need_still, write_parts

VERSION = 1
PAPER = ("en_de", "en_ca", "en_ar", "en_tr")
SPLITS = {"train": "train", "train_covost": "train", "dev": "dev", "test": "test"}
"""CoVoST's splits to ours; rows of train_covost are training data that Common Voice has in no split."""
LICENCE = "CC0 (Common Voice 4.0); translations CC0 to English, CC-BY-NC-4.0 from English (CoVoST 2)"


def prepare(root: Path, source: Path, translations: Path | None = None, pairs: Sequence[str] | None = None) -> Path:
    """Writes ``PAIR_train``, ``PAIR_dev`` and ``PAIR_test`` with ``text`` and ``translation``.

    Args:
        root: the corpus folder; the audio stays where it is.
        source: Common Voice 4.0: a folder for each source language with ``clips/`` and ``validated.tsv``.
        translations: the folder of ``covost_v2.en_de.tsv``, ...; None: ``source``.
        pairs: source and target, as ``en_de``; None: those of the paper, or what a finished corpus has.

    Raises:
        CorpusError: a file is missing or has other columns; ``root`` holds another corpus.
    """
    need_folder(source, "the folder of Common Voice 4.0, with a folder a language")
    wanted = list(PAPER if pairs is None else pairs)
    for pair in wanted:
        if pair.count("_") != 1:
            raise CorpusError(f"--pairs {pair}: expected source and target, as en_de")
    folder = source if translations is None else translations
    request = {
        "source": str(source.resolve()),
        "translations": None if translations is None else str(translations.resolve()),
        "pairs": None if pairs is None else wanted,
        "version": VERSION,
    }

    def build() -> None:
        left_out: Counter[str] = Counter()
        built = {**request, "translations": str(folder.resolve()), "pairs": wanted}
        about = {"name": "covost2", "request": built, "licences": {"speech and text": LICENCE}}
        rows = (row for pair in wanted for row in _rows(source, folder, pair, left_out))
        write_parts(root, about, rows, left_out=left_out)

    return prepare_once(root, "covost2", request, build)


def _table(path: Path, columns: Sequence[str], what: str) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise CorpusError(f"{path} does not exist: it is {what}")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")  # a last line that is cut off
        if missing := [column for column in columns if column not in (rows.fieldnames or [])]:
            raise CorpusError(f"{path}: no column {', '.join(missing)}; it has {', '.join(rows.fieldnames or [])}")
        yield from rows


def _rows(source: Path, folder: Path, pair: str, left_out: Counter[str]) -> Iterator[tuple[tuple[str, ...], Row]]:
    import soundfile

    language, target = pair.split("_")
    voices = source / language
    translated = {}
    where = f"part of CoVoST 2: covost_v2.{pair}.tsv.tar.gz, unpacked (--translations)"
    for row in _table(folder / f"covost_v2.{pair}.tsv", ("path", "translation", "split"), where):
        if row["split"] in SPLITS:
            translated[row["path"]] = (SPLITS[row["split"]], row["translation"])
        else:
            left_out[f"{pair}: split {row['split']}"] += 1
    where = "part of Common Voice 4.0 (--source)"
    sentences = [
        row
        for row in _table(voices / "validated.tsv", ("client_id", "path", "sentence"), where)
        if row["path"] in translated
    ]
    left_out[f"{pair}: translated, but not in validated.tsv"] += len(translated) - len(sentences)

    def seconds(row: dict[str, str]) -> float | None:
        try:
            return soundfile.info(voices / "clips" / row["path"]).duration
        except (soundfile.SoundFileError, OSError):
            return None

    good = None
    for row, duration in zip(sentences, in_threads(seconds, sentences), strict=True):
        split, translation = translated[row["path"]]
        text, translation = row["sentence"].strip(' "'), translation.strip(' "')
        if duration is None or not text or not translation:
            left_out[f"{pair}: " + ("no readable audio" if duration is None else "no text")] += 1
            continue
        good = good or voices / "clips" / row["path"]
        yield (
            (f"{pair}_{split}",),
            {
                "audio_filepath": str((voices / "clips" / row["path"]).resolve()),
                "duration": duration,
                "text": text,
                "translation": translation,
                "lang": language,
                "target_lang": target,
                "speaker": row["client_id"],
            },
        )
    if left_out[f"{pair}: no readable audio"]:
        need_still(good)
