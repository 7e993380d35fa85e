"""The layout every recipe leaves behind: manifests, text stream, and `corpus.json`, written last (docs/data.md)."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_slam.data.corpora.files import (
    CorpusError,
    is_marker,
    locked,
    read_marker,
    remove_leftovers,
    sha256,
    write_text,
)
from nemo_slam.data.corpora.normalise import fold
from nemo_slam.data.corpora.splits import pick

logger = logging.getLogger("nemo_slam.data")

SPLITS = ("train", "dev", "test")
FOLDERS = ("audio", "manifests", "text", "tokenizers")
LOCK = ".prepare.lock"
TEXT_SHARES = {"train": 0.98, "dev": 0.02}
# A held-out prompt of at least so many words must not occur inside a longer line either ("thank you" may).
MIN_CONTAINED_WORDS = 3
MAX_WORDS = 120  # of a line; the few longer "verses" are passages that another numbering keeps in one place

Row = dict[str, Any]


def prepare_once(root: Path, name: str, request: Mapping[str, Any], build: Callable[[], None]) -> Path:
    """Runs ``build`` unless ``root`` holds corpus ``name`` prepared with the same ``request``.

    Processes that call this at once wait for the first. A build that was killed is started over: only `corpus.json`,
    which ``build`` writes last (`finish`), says that a corpus is complete.

    Args:
        root: the corpus folder.
        name: the recipe's name.
        request: what the preparation depends on, JSON values only; another request prepares the corpus anew. None as
            a value takes whatever a finished corpus was prepared with.
        build: prepares the corpus and calls `finish`, whose ``about["request"]`` says what was built.

    Raises:
        CorpusError: ``root`` holds another corpus, or folders of these names that are no corpus of ours.
    """
    if _is_done(root, name, request):
        return root
    _refuse_foreign(root)
    with locked(root, "prepare"):
        if _is_done(root, name, request):  # another process prepared it while this one waited
            return root
        logger.info("preparing corpus %s in %s", name, root)
        (root / "corpus.json").unlink(missing_ok=True)
        for folder in FOLDERS:
            shutil.rmtree(root / folder, ignore_errors=True)
        remove_leftovers(root)
        build()
    return root


def _refuse_foreign(root: Path) -> None:
    """A corpus is made anew by removing what an earlier preparation left; nobody else's folders are removed."""
    if (root / LOCK).exists() or is_marker(root):
        return
    if found := [folder for folder in FOLDERS if (root / folder).exists()]:
        raise CorpusError(f"{root} holds {', '.join(found)}, which no preparation made: choose another folder (--root)")


def pick_languages(languages: Sequence[str], known: Sequence[str]) -> list[str]:
    """``languages`` in the order of ``known``. Raises ValueError if there are none, or one is not known."""
    if not languages or set(languages) - set(known):
        raise ValueError(f"languages {list(languages)}: expected some of {', '.join(known)}")
    return [language for language in known if language in languages]


def _is_done(root: Path, name: str, request: Mapping[str, Any]) -> bool:
    marker = read_marker(root)
    if marker is None:
        return False
    if marker.get("name") != name:
        raise CorpusError(f"{root} holds corpus {marker.get('name')!r}, not {name!r}: choose another folder (--root)")
    built = marker["request"]
    if any(value is not None and built.get(key) != value for key, value in request.items()):
        logger.info("%s was prepared with %s, now asked for %s", root, built, dict(request))
        return False
    logger.info("corpus %s is already in %s", name, root)
    return True


def filter_text(lines: Iterable[str], held_out: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Distinct ``lines`` of at most ``MAX_WORDS`` words, without the texts of dev and test prompts.

    A line goes if it equals a held-out text, or contains one of ``MIN_CONTAINED_WORDS`` words or more as a run of
    words; both compared without diacritics. Lines must be normalised.

    Returns:
        the lines kept, in order, and how many were left out by reason.
    """
    texts = {fold(text) for text in held_out}
    runs = {tuple(text.split()) for text in texts if len(text.split()) >= MIN_CONTAINED_WORDS}
    # A run is looked up by its first words, so a line costs one look-up a position and not one a held-out text.
    by_start: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for run in runs:
        by_start.setdefault(run[:MIN_CONTAINED_WORDS], []).append(run)
    kept: dict[str, None] = {}
    left_out: Counter[str] = Counter()
    for line in lines:
        folded = fold(line)
        words = tuple(folded.split())
        if folded in texts or any(
            words[start : start + len(run)] == run
            for start in range(len(words) - MIN_CONTAINED_WORDS + 1)
            for run in by_start.get(words[start : start + MIN_CONTAINED_WORDS], ())
        ):
            left_out["text of a dev or test prompt"] += 1
        elif len(words) > MAX_WORDS:
            left_out[f"longer than {MAX_WORDS} words"] += 1
        elif line in kept:
            left_out["repeated line"] += 1
        else:
            kept[line] = None
    return list(kept), left_out


def finish(
    root: Path,
    rows: Mapping[str, Mapping[str, list[Row]]],
    text: Iterable[str],
    about: Mapping[str, Any],
    text_left_out: Counter[str],
) -> None:
    """Writes manifests and text, then ``corpus.json``, whose presence says that the corpus is complete.

    Args:
        root: the corpus folder.
        rows: language -> split -> manifest rows; ``audio_filepath`` relative to ``root``/manifests.
        text: normalised lines of the text stream; the dev and test prompts' texts are filtered out here.
        about: what else ``corpus.json`` says: name, request, licences, packages, what was left out.
        text_left_out: counts, by reason, of lines that ``text`` itself leaves out; those left out here are added.
    """
    written: list[str] = []
    counts: dict[str, dict[str, Any]] = {}
    for language, splits in rows.items():
        counts[language] = {split: _count(splits[split]) for split in SPLITS}
        for split in SPLITS:
            written.append(_manifest(root, f"{language}_{split}", splits[split]))
    for split in SPLITS:
        together = [row for splits in rows.values() for row in splits[split]]
        written.append(_manifest(root, f"speech_{split}", together))
    held_out = [row["text"] for splits in rows.values() for split in ("dev", "test") for row in splits[split]]
    lines, filtered = filter_text(text, held_out)
    parts: dict[str, list[str]] = {name: [] for name in TEXT_SHARES}
    for line in lines:
        parts[pick(f"text:{fold(line)}", TEXT_SHARES)].append(line)
    for name, part in parts.items():
        write_text(root / "text" / f"{name}.txt", "".join(f"{line}\n" for line in part))
        written.append(f"text/{name}.txt")
    marker = {
        **about,
        "speech": counts,
        "text": {
            **{name: {"lines": len(part), "words": sum(len(x.split()) for x in part)} for name, part in parts.items()},
            "left_out": dict(text_left_out + filtered),
        },
        "sha256": {name: sha256(root / name) for name in written},
    }
    write_text(root / "corpus.json", json.dumps(marker, indent=2, ensure_ascii=False) + "\n")
    for language, splits in counts.items():
        logger.info("%s: %s", language, ", ".join(f"{k} {v['utterances']} ({v['hours']} h)" for k, v in splits.items()))
    logger.info("text: %s", ", ".join(f"{name} {len(part)} lines" for name, part in parts.items()))


def _manifest(root: Path, name: str, rows: list[Row]) -> str:
    path = f"manifests/{name}.json"
    write_text(root / path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _count(rows: list[Row]) -> dict[str, Any]:
    count = {"utterances": len(rows), "hours": round(sum(row["duration"] for row in rows) / 3600, 4)}
    if any("translation" in row for row in rows):
        count["translated"] = sum("translation" in row for row in rows)
    return count
