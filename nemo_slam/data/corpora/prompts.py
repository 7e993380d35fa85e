"""Human-read telephone prompts in English, Spanish and French, from Debian packages; public-domain text beside them.

The prompt ids are the same in every language, so that a Spanish or French recording has the English transcript of the
same id as its translation. One speaker a language (English and Spanish share theirs): say so beside every number.
"""

from __future__ import annotations

import gzip
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_slam.data.corpora import apt, sword, wordnet
from nemo_slam.data.corpora.asterisk import NOT_TRANSLATED, Transcripts, parse_transcripts
from nemo_slam.data.corpora.deb import read_deb
from nemo_slam.data.corpora.files import SAMPLE_RATE, CorpusError, sha256, write_wav
from nemo_slam.data.corpora.layout import SPLITS, Row, finish, pick_languages, prepare_once
from nemo_slam.data.corpora.normalise import fold, normalise
from nemo_slam.data.corpora.splits import group_splits

LANGUAGES = ("en", "es", "fr")
VERSION = 1  # of the recipe: a corpus of another version is prepared anew
_SALT = "asterisk"  # of the few names tried, the one whose hash splits the prompts nearest to 80/8/12
_TEXT_PACKAGES = {"sword-text-web": "en", "sword-text-sparv": "es", "wordnet-base": "en"}
_LICENCES = {
    "speech": "CC-BY-SA-3.0; recorded by Allison Smith (en, es) and June Wallack (fr); Digium, Inc.",
    "sword-text-web": "public domain (the unaltered text is the World English Bible, a trademark of eBible.org)",
    "sword-text-sparv": "public domain (Reina-Valera, 1909)",
    "wordnet-base": "WordNet 3.0 licence, Princeton University (free use with its notice)",
}


def prepare(root: Path, languages: Sequence[str] | None = None) -> Path:
    """Prepares the corpus below ``root``; returns at once if it holds just these languages already.

    The splits do not depend on ``languages``: the transcripts of all three decide them.

    Args:
        root: the corpus folder.
        languages: some of en, es, fr. None: all three, or whatever a finished corpus in ``root`` has.

    Raises:
        ValueError: a language there are no prompts for.
        CorpusError: apt-get is missing, offline, or has no such packages; or ``root`` holds another corpus.
    """
    wanted = None if languages is None else pick_languages(languages, LANGUAGES)
    request = {"languages": wanted, "version": VERSION}
    return prepare_once(root, "prompts", request, lambda: _build(root, wanted or list(LANGUAGES)))


def _build(root: Path, wanted: list[str]) -> None:
    work = root / "packages"
    names = [f"asterisk-core-sounds-{language}" for language in LANGUAGES]
    names += [f"asterisk-core-sounds-{language}-g722" for language in wanted] + list(_TEXT_PACKAGES)
    debs = apt.fetch(names, work)
    transcripts = {x: _transcripts(debs[f"asterisk-core-sounds-{x}"], x) for x in LANGUAGES}
    texts = ((prompt, [fold(text)]) for found in transcripts.values() for prompt, text in found.texts.items())
    splits = group_splits(texts, _SALT)
    rows = {
        language: _speech(root, debs[f"asterisk-core-sounds-{language}-g722"], language, transcripts, splits)
        for language in wanted
    }
    packages = {
        name: {"version": apt.version(deb), "file": deb.name, "sha256": sha256(deb)} for name, deb in debs.items()
    }
    text_left_out: Counter[str] = Counter()
    about = {
        "name": "prompts",
        "request": {"languages": wanted, "version": VERSION},
        "synthetic": False,
        "speakers": "one a language; English and Spanish share theirs",
        "licences": _LICENCES,
        "packages": packages,
        "left_out": {language: dict(+transcripts[language].left_out) for language in wanted},
    }
    finish(root, rows, _text(debs, text_left_out), about, text_left_out)
    shutil.rmtree(work)


def _transcripts(deb: Path, language: str) -> Transcripts:
    name = f"core-sounds-{language}.txt"
    for member, content in read_deb(deb):
        if member.endswith((f"/{name}.gz", f"/{name}")):
            content = gzip.decompress(content) if member.endswith(".gz") else content
            return parse_transcripts(content.decode("utf-8"), language)
    raise CorpusError(f"{deb.name}: no {name} in this package; its layout has changed")


def _speech(
    root: Path, deb: Path, language: str, transcripts: dict[str, Transcripts], splits: dict[str, str]
) -> dict[str, list[Row]]:
    """Decodes the recordings that have a transcript; returns the manifest rows of each split, by prompt id."""
    found, english = transcripts[language], transcripts["en"]
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    heard = set()
    for member, content in read_deb(deb):
        match = re.search(r"/sounds/[^/]+/(?P<id>.+)\.g722$", member)
        if match is None or match["id"] not in found.texts:
            found.left_out["recording without a usable transcript"] += match is not None
            continue
        prompt = match["id"]
        heard.add(prompt)
        pcm = decode_g722(content)
        write_wav(root / "audio" / language / f"{prompt}.wav", pcm)
        row: Row = {
            "audio_filepath": f"../audio/{language}/{prompt}.wav",
            "duration": len(pcm) / 2 / SAMPLE_RATE,
            "text": found.texts[prompt],
            "lang": language,
            "prompt_id": prompt,
        }
        if language != "en" and prompt in english.texts and (language, prompt) not in NOT_TRANSLATED:
            row["translation"] = english.texts[prompt]
        rows[splits[prompt]].append(row)
    found.left_out["transcript without a recording"] += len(found.texts.keys() - heard)
    for split in SPLITS:
        rows[split].sort(key=lambda row: row["prompt_id"])
    return rows


def decode_g722(content: bytes) -> bytes:
    """Decodes 64 kbit/s G.722 to 16 kHz PCM16: two samples a byte, little-endian.

    The codec is ITU's, in C (package G722): the same samples as FFmpeg's decoder gives.
    """
    from G722 import G722

    samples = G722(SAMPLE_RATE, 64000).decode(content)
    if sys.byteorder == "big":
        samples.byteswap()
    return bytes(memoryview(samples).cast("B"))


def _text(debs: dict[str, Path], left_out: Counter[str]) -> Iterator[str]:
    """Normalised lines of the text stream; those that cannot be spelled out with certainty are counted and left out."""
    for name, language in _TEXT_PACKAGES.items():
        members = {member: content for member, content in read_deb(debs[name]) if "/doc/" not in member}
        if name.startswith("sword-"):
            lines = sword.verses({Path(m).name: c for m, c in members.items() if "/ztext/" in m})
        else:
            data = [c for m, c in sorted(members.items()) if Path(m).stem == "data"]
            lines = (line for content in data for line in wordnet.examples(content))
        for line in lines:
            if spoken := normalise(line, language):
                yield spoken
            else:
                left_out["no words, or a number that can be read in several ways"] += 1
