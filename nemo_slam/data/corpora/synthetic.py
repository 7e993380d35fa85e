"""Synthetic speech: sentences of a small parallel grammar read by eSpeak NG. Needs no network once it is installed.

Good for trying the machinery; not for results. Every manifest row and `corpus.json` say `"synthetic": true`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from nemo_slam.data.corpora.files import SAMPLE_RATE, write_wav
from nemo_slam.data.corpora.layout import SPLITS, Row, finish, pick_languages, prepare_once
from nemo_slam.data.corpora.normalise import fold
from nemo_slam.data.corpora.splits import group_splits

LANGUAGES = ("en", "es", "fr")
VERSION = 1
SENTENCES = 300
FEWEST = 50  # with fewer, the hash may leave dev or test empty
VOICES = {
    "en": ("en-us", "en-us+f2", "en-gb-x-rp+m3", "en-gb-scotland+f4"),
    "es": ("es+m3", "es+f2", "es-419+m7", "es-419+f3"),
    "fr": ("fr+m3", "fr+f2", "fr-be+f4", "fr-ch+m7"),
}
# (en, es, fr): any choice from each column's rows is a sentence, and the three are translations of each other.
_SUBJECTS = (
    ("the teacher", "la profesora", "la professeure"),
    ("my brother", "mi hermano", "mon frère"),
    ("our neighbour", "nuestra vecina", "notre voisine"),
    ("the old doctor", "el viejo médico", "le vieux médecin"),
    ("a young woman", "una mujer joven", "une jeune femme"),
    ("the cook", "el cocinero", "le cuisinier"),
    ("your friend", "tu amiga", "ton amie"),
    ("the little girl", "la niña", "la petite fille"),
)
_VERBS = (
    ("finds", "encuentra", "trouve"),
    ("sells", "vende", "vend"),
    ("is looking for", "busca", "cherche"),
    ("forgets", "olvida", "oublie"),
    ("carries", "lleva", "porte"),
    ("paints", "pinta", "peint"),
)
_OBJECTS = (
    ("a red book", "un libro rojo", "un livre rouge"),
    ("the green door", "la puerta verde", "la porte verte"),
    ("two chairs", "dos sillas", "deux chaises"),
    ("a long letter", "una carta larga", "une longue lettre"),
    ("the blue cup", "la taza azul", "la tasse bleue"),
    ("some bread", "un poco de pan", "un peu de pain"),
    ("the key", "la llave", "la clé"),
    ("three apples", "tres manzanas", "trois pommes"),
    ("a small box", "una caja pequeña", "une petite boîte"),
)
_PLACES = (
    ("in the garden", "en el jardín", "dans le jardin"),
    ("near the river", "cerca del río", "près de la rivière"),
    ("at the market", "en el mercado", "au marché"),
    ("behind the house", "detrás de la casa", "derrière la maison"),
    ("on the train", "en el tren", "dans le train"),
    ("at school", "en la escuela", "à l'école"),
)
_TIMES = (
    ("today", "hoy", "aujourd'hui"),
    ("every morning", "cada mañana", "chaque matin"),
    ("after dinner", "después de la cena", "après le dîner"),
    ("in winter", "en invierno", "en hiver"),
)


def prepare(root: Path, languages: Sequence[str] | None = None, sentences: int | None = None) -> Path:
    """Prepares the corpus below ``root``; returns at once if it is there already.

    Args:
        root: the corpus folder.
        languages: some of en, es, fr. None: all three, or whatever a finished corpus in ``root`` has.
        sentences: how many are read, in every language; ten times as many make the text stream. None: ``SENTENCES``,
            or whatever a finished corpus has.

    Raises:
        ValueError: unknown language, or more sentences than the grammar has.
        CorpusError: eSpeak NG is not installed; or ``root`` holds another corpus.
    """
    wanted = None if languages is None else pick_languages(languages, LANGUAGES)
    most = len(_grammar()) // 11  # so that the text stream has others
    if sentences is not None and not FEWEST <= sentences <= most:
        raise ValueError(f"sentences {sentences}: expected {FEWEST} to {most}")
    request = {"languages": wanted, "sentences": sentences, "version": VERSION}
    return prepare_once(
        root, "synthetic", request, lambda: _build(root, wanted or list(LANGUAGES), sentences or SENTENCES)
    )


def _grammar() -> list[tuple[str, str, str]]:
    """Every sentence of the grammar as (en, es, fr)."""
    sentences = []
    for choice in product(_SUBJECTS, _VERBS, _OBJECTS, _PLACES, _TIMES):
        english, spanish, french = (" ".join(words) for words in zip(*choice, strict=True))
        sentences.append((english, spanish, french))
    return sentences


def _build(root: Path, languages: list[str], sentences: int) -> None:
    from nemo_slam.data.corpora.espeak import Espeak

    espeak = Espeak()
    chosen = random.Random(0).sample(_grammar(), 11 * sentences)
    read, unread = chosen[:sentences], chosen[sentences:]
    names = {f"sentence-{number:05d}": texts for number, texts in enumerate(read)}
    splits = group_splits(((name, map(fold, texts)) for name, texts in names.items()), "synthetic")
    draw = random.Random(1)
    rows: dict[str, dict[str, list[Row]]] = {}
    for language in languages:
        rows[language] = {split: [] for split in SPLITS}
        for name, texts in names.items():
            text, voice = texts[LANGUAGES.index(language)], draw.choice(VOICES[language])
            samples = espeak.say(text, voice, rate=draw.randint(140, 190), pitch=draw.randint(35, 65))
            write_wav(root / "audio" / language / f"{name}.wav", samples.astype("<i2").tobytes())
            row: Row = {
                "audio_filepath": f"../audio/{language}/{name}.wav",
                "duration": len(samples) / SAMPLE_RATE,
                "text": text,
                "lang": language,
                "prompt_id": name,
                "speaker": voice,
                "synthetic": True,
            }
            if language != "en":
                row["translation"] = texts[0]
            rows[language][splits[name]].append(row)
    about = {
        "name": "synthetic",
        "request": {"languages": languages, "sentences": sentences, "version": VERSION},
        "synthetic": True,
        "speakers": {language: VOICES[language] for language in languages},
        "licences": {"speech and text": "Apache-2.0 (made here); read by eSpeak NG, itself GPL-3.0-or-later"},
    }
    lines = [texts[LANGUAGES.index(language)] for language in languages for texts in unread]
    finish(root, rows, lines, about, Counter())
