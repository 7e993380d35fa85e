"""Text as a speech recogniser should write it: what is said, in lower case, in its own script, without punctuation.

Digits and key signs are spelled out where one spelling is certain (single digits, ``*``, ``#``, a dot inside a name).
A number of several digits can be read in several ways ("500": five hundred, five zero zero), so such a text is refused
rather than guessed at. Diacritics stay as written.
"""

from __future__ import annotations

import re
import unicodedata

_DIGITS = {
    "en": "zero one two three four five six seven eight nine",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
}
_SIGNS = {
    "en": {"*": "star", "#": "pound", "@": "at", "&": "and", "%": "percent"},
    "es": {"*": "asterisco", "#": "tecla de numero", "@": "arroba", "%": "por ciento"},
    "fr": {"*": "étoile", "#": "dièse", "@": "arobas", "&": "et", "%": "pour cent"},
}
_DOT = {"en": "dot", "es": "punto", "fr": "point"}
LANGUAGES = tuple(_DIGITS)

_ABBREVIATION = re.compile(r"\b(?:[^\W\d_]\.){2,}")  # a.m. p.m.
_INNER_DOT = re.compile(r"(?<=[^\W_])\.(?=[^\W_])")  # asterisk.org
_APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'", "`": "'", "´": "'"})
_OTHER = re.compile(r"[^\w']|_")
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")


def normalise(text: str, language: str) -> str | None:
    """Spoken form of ``text``, or None if it holds no word or cannot be spelled out with certainty.

    >>> normalise("Please press 1, or *.", "en")
    'please press one or star'
    >>> normalise("Appuyez sur l’étoile", "fr")
    "appuyez sur l'étoile"
    >>> normalise("dial 500", "en") is None
    True

    Raises:
        ValueError: no rules for ``language``.
    """
    if language not in _DIGITS:
        raise ValueError(f"no text rules for language {language!r}: expected one of {', '.join(LANGUAGES)}")
    text = unicodedata.normalize("NFC", text).lower().translate(_APOSTROPHES)
    text = _ABBREVIATION.sub(lambda match: " ".join(match.group().replace(".", " ")) + " ", text)
    if "www." in text:
        text = text.replace("www.", "w w w.")
    if re.search(r"\d[\d.,:]*\d", text):
        return None
    text = _INNER_DOT.sub(f" {_DOT[language]} ", text)
    words = _DIGITS[language].split()
    text = re.sub(r"[0-9]", lambda match: f" {words[int(match.group())]} ", text)
    for sign, word in _SIGNS[language].items():
        text = text.replace(sign, f" {word} ")
    text = _LOOSE_APOSTROPHE.sub(" ", _OTHER.sub(" ", text))
    text = " ".join(text.split())
    if not re.search(r"[^\W\d_]", text) or re.search(r"\d", text):
        return None
    return text


def fold(text: str) -> str:
    """Key under which two normalised texts count as equal: without diacritics (transcripts write them unevenly)."""
    decomposed = unicodedata.normalize("NFD", text.lower())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))
