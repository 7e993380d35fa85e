"""Transcripts and translations beside their references, word by word, with the errors marked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_slam.evaluation.scoring import Options, check_references, read_transcripts, score
from nemo_slam.evaluation.text_metrics import normalise

SHOWN = 25
"""Utterances in the report; its title says of how many."""


@dataclass(frozen=True)
class Word:
    """A place of the alignment. ``kind``: hit, substituted, deleted (``hypothesis`` empty) or inserted (``reference``
    empty)."""

    kind: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Utterance:
    name: str
    words: tuple[Word, ...]

    @property
    def errors(self) -> int:
        return sum(word.kind != "hit" for word in self.words)


@dataclass(frozen=True)
class Transcripts:
    """A file of transcripts.

    Attributes:
        scores: (metric, value with interval) in percent.
        utterances: spread evenly from the best to the worst by share of wrong words.
        total: how many the file has.
    """

    title: str
    reference: str
    scores: tuple[tuple[str, str], ...]
    utterances: tuple[Utterance, ...]
    total: int


def align(reference: str, hypothesis: str) -> tuple[Word, ...]:
    """Words of both, aligned with the fewest edits (jiwer).

    >>> [word.kind for word in align("uno dos", "uno tres cuatro")]
    ['hit', 'substituted', 'inserted']
    """
    import jiwer

    expected, heard = reference.split(), hypothesis.split()
    words: list[Word] = []
    for chunk in jiwer.process_words(reference, hypothesis).alignments[0]:
        before = expected[chunk.ref_start_idx : chunk.ref_end_idx]
        after = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "insert":
            words += [Word("inserted", "", word) for word in after]
        elif chunk.type == "delete":
            words += [Word("deleted", word, "") for word in before]
        else:
            kind = "hit" if chunk.type == "equal" else "substituted"
            words += [Word(kind, *pair) for pair in zip(before, after, strict=True)]
    return tuple(words)


def read(path: Path, reference: str) -> Transcripts:
    """Align and score the lines of ``scripts/transcribe.py``.

    Args:
        reference: the key of the reference: ``text``, or ``translation`` (then BLEU and chrF beside the word errors).

    Raises:
        ValueError: a line without transcript or reference, by its number.
    """
    rows = read_transcripts(path)
    metrics = ("bleu", "chrf", "wer") if reference == "translation" else ("wer", "cer")
    options = Options(metrics, reference)
    check_references(rows, options, str(path))
    if not rows:
        raise ValueError(f"{path}: no transcripts in it")
    overall = score(rows, options)["groups"]["all"]
    scores = tuple((m, "{value:.1f} [{low:.1f}, {high:.1f}]".format(**overall[m])) for m in metrics)
    found = []
    for number, row in enumerate(rows, 1):
        texts = (normalise(row[key], options.normalisation) for key in (reference, "pred_text"))
        name = Path(row["audio_filepath"]).name if "audio_filepath" in row else f"line {number}"
        found.append(Utterance(name, align(*texts)))
    found.sort(key=lambda item: item.errors / max(1, len(item.words)))
    number = min(SHOWN, len(found))
    chosen = [found[round(i * (len(found) - 1) / max(1, number - 1))] for i in range(number)]
    return Transcripts(path.name, reference, scores, tuple(chosen), len(rows))
