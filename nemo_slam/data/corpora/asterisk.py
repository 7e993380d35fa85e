"""Parses the transcripts of the Asterisk prompts: lines `prompt id: text`, with notes in brackets for the reader."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from nemo_slam.data.corpora.normalise import normalise

# Spelling alphabets, single letters and product names: read letter by letter, or not words of the language.
_APART = re.compile(r"^(phonetic/|letters/|spy-|silence/)")
_LINE = re.compile(r"^(?P<id>[A-Za-z0-9][\w/.-]*):(?:\s|$)\s*(?P<text>.*)$")
_NOTE = re.compile(r"\s*(?:\[[^\]]*\]|\([^)]*\)|<[^>]*>)")
# Two lines of the file run together: "... dièse.vm-review-nonurgent: Pour enlever ..."
_RUN_TOGETHER = re.compile(r"(?<=[.!?])[a-z]+(?:-[a-z0-9]+)+: .*$")
# Faults of the packages (1.6.1), found by comparing languages and by the rate of speech.
WRONG = {
    ("fr", "digits/h-80"): "the text of digits/h-70",
    ("fr", "dir-multi3"): "Spanish text in the French file",
    ("fr", "vm-mismatch"): "31 characters a second, where the next has 23: the last sentence is not in the recording",
    ("es", "vm-mismatch"): "23 characters a second, where the next has 17: the last sentence is not in the recording",
}
# Recording and transcript agree, but say something other than the English prompt.
NOT_TRANSLATED = {("fr", "demo-moreinfo")}


@dataclass
class Transcripts:
    """Normalised texts of one language by prompt id, and how many lines were left out, by reason."""

    texts: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


def parse_transcripts(content: str, language: str) -> Transcripts:
    """Transcripts of the prompts that can be used for speech recognition.

    Left out, and counted by reason: spelling alphabets, letters and `spy-*`; prompts without words (tones, silence);
    numbers of several digits (`normalise`); a bracket inside the sentence (nobody knows whether it is read out; one
    that ends the prompt is a note, and cut); a prompt id that occurs again; known wrong transcripts.

    Args:
        content: the file's text; `;` starts a comment line.
        language: `en`, `es` or `fr`.
    """
    found = Transcripts()
    for line in content.splitlines():
        if not line.strip() or line.startswith(";"):
            continue
        match = _LINE.match(line)
        if match is None:
            found.left_out["not a transcript line"] += 1
            continue
        prompt, text = match["id"], match["text"].strip()
        if _APART.match(prompt):
            found.left_out["spelling, names or silence"] += 1
        elif (language, prompt) in WRONG:
            found.left_out["wrong transcript"] += 1
        elif prompt in found.texts:
            found.left_out["repeated prompt id"] += 1
        elif reason := _add(found.texts, prompt, text, language):
            found.left_out[reason] += 1
    return found


def _add(texts: dict[str, str], prompt: str, text: str, language: str) -> str | None:
    """Adds the prompt's normalised text, or returns why not."""
    text = _RUN_TOGETHER.sub("", text).strip()
    while note := re.search(rf"(?:{_NOTE.pattern})\s*$", text):
        text = text[: note.start()].strip()
    if not re.search(r"\w", text):
        return "no words"
    if _NOTE.search(text):
        return "bracket inside the sentence"
    spoken = normalise(text, language)
    if spoken is None:
        return "number that can be read in several ways"
    texts[prompt] = spoken
    return None
