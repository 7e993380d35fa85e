"""The prompts corpus end to end on miniature packages: real G.722, real transcripts' quirks, a real zText module."""

import gzip
import json
import struct
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
from G722 import G722
from miniature_debs import write_deb

from nemo_slam.data.corpora import apt, prepare, prompts
from nemo_slam.data.corpora.files import CorpusError, sha256
from nemo_slam.data.corpora.normalise import fold

SHARED = 60  # prompt ids in every language
# Equal but for a diacritic, under different ids; "Extension" is among them.
NEARLY_ENGLISH = [("Extension", "Extensión!"), *((f"Pla{letter}", f"plá{letter}") for letter in "bcdfghjklm")]
VOICE = {"en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June"}


def _transcripts(language: str) -> dict[str, str]:
    """Ids shared by the languages; texts that repeat within (every tenth) and across (\"no\", \"extension\") them."""
    texts = {
        f"vm-item{n}": f"{language} text of the item {'abcdefghij'[n % 10]} {'klmnop'[n // 10]}" for n in range(SHARED)
    }
    for n in range(0, SHARED, 10):
        texts[f"vm-item{n}"] = f"{language} text that comes again"
    texts["digits/no"] = "No."
    for number, (english, spanish) in enumerate(NEARLY_ENGLISH):
        texts[f"{language}-word{number}"] = {"en": english, "es": spanish, "fr": f"mot {'abcdefghijk'[number]}"}[
            language
        ]
    texts[f"only-{language}"] = "no"
    texts["beep"] = "[a beep]"
    return texts


def _tone(seconds: float) -> np.ndarray:
    time = np.arange(int(16000 * seconds)) / 16000
    return (8000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)


def _encode(samples: np.ndarray) -> bytes:
    return bytes(G722(16000, 64000).encode(samples.tolist()))


def _ztext(lines: list[str]) -> dict[str, bytes]:
    places, block = b"", b""
    for line in lines:
        places += struct.pack("<IIH", 0, len(block), len(line.encode()))
        block += line.encode()
    packed = zlib.compress(block)
    return {"nt.bzs": struct.pack("<III", 0, len(packed), len(block)), "nt.bzv": places, "nt.bzz": packed}


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Stands in for apt: writes the packages into the folder it is given. Returns the names asked for, call by call."""
    sounds = {
        language: {
            f"usr/share/asterisk/sounds/{VOICE[language]}/{prompt}.g722": _encode(_tone(0.4))
            for prompt in (*_transcripts(language), "no-transcript")
        }
        for language in VOICE
    }
    asked = []

    def fetch(names, folder):
        asked.append(list(names))
        contents = {}
        for language in VOICE:
            lines = "; a comment\n\n" + "".join(f"{k}: {v}\n" for k, v in _transcripts(language).items())
            folder_name = f"usr/share/doc/asterisk-core-sounds-{language}"
            contents[f"asterisk-core-sounds-{language}"] = {
                f"{folder_name}/core-sounds-{language}.txt.gz": gzip.compress(lines.encode(), mtime=0)
            }
            contents[f"asterisk-core-sounds-{language}-g722"] = sounds[language]
        every_prompt = [text for language in VOICE for text in _transcripts(language).values()]
        web = ["<w>In the beginning</w>.", "It had 500 sheep.", *(f"And he said: {text}!" for text in every_prompt)]
        contents["sword-text-web"] = {f"usr/share/sword/modules/texts/ztext/eng/{k}": v for k, v in _ztext(web).items()}
        contents["sword-text-sparv"] = {
            f"usr/share/sword/modules/texts/ztext/spa/{k}": v for k, v in _ztext(["EN el principio crió"]).items()
        }
        contents["wordnet-base"] = {"usr/share/wordnet/data.noun": b'0001 | a thing; "such a fine thing"\n'}
        return {name: write_deb(folder / "debs" / f"{name}_1.6.1-1_all.deb", contents[name], "none") for name in names}

    monkeypatch.setattr(apt, "fetch", fetch)
    return asked


def _rows(root: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (root / "manifests" / f"{name}.json").read_text(encoding="utf-8").splitlines()]


def test_layout(tmp_path, packages):
    root = prepare("prompts", tmp_path / "prompts")
    marker = json.loads((root / "corpus.json").read_text())
    assert marker["synthetic"] is False
    assert marker["packages"]["asterisk-core-sounds-fr-g722"]["version"] == "1.6.1-1"
    assert marker["left_out"]["en"] == {"no words": 1, "recording without a usable transcript": 2}
    assert all(sha256(root / name) == digest for name, digest in marker["sha256"].items())
    for split in ("train", "dev", "test"):
        together = [row for language in VOICE for row in _rows(root, f"{language}_{split}")]
        assert _rows(root, f"speech_{split}") == together
        for language in VOICE:
            rows = _rows(root, f"{language}_{split}")
            count = marker["speech"][language][split]
            assert count["utterances"] == len(rows) > 0
            assert count["hours"] == pytest.approx(sum(row["duration"] for row in rows) / 3600, abs=1e-4)
            assert [row["prompt_id"] for row in rows] == sorted(row["prompt_id"] for row in rows)
    assert not (root / "packages").exists()
    assert not list(root.rglob(".partial-*"))


def test_rows_and_audio(tmp_path, packages):
    root = prepare("prompts", tmp_path / "prompts")
    seen = 0
    for split in ("train", "dev", "test"):
        for row in _rows(root, f"speech_{split}"):
            seen += 1
            language, prompt = row["lang"], row["prompt_id"]
            assert row["audio_filepath"] == f"../audio/{language}/{prompt}.wav"
            with wave.open(str(root / "manifests" / row["audio_filepath"])) as audio:
                assert (audio.getframerate(), audio.getnchannels(), audio.getsampwidth()) == (16000, 1, 2)
                assert audio.getnframes() / 16000 == row["duration"] == 0.4
            assert fold(row["text"]) == fold(_transcripts(language)[prompt].strip(".!").lower())
            english = _transcripts("en").get(prompt)
            expected = english.strip(".").lower() if english and language != "en" else None
            assert row.get("translation") == expected
    assert seen == 3 * (SHARED + 2 + len(NEARLY_ENGLISH))


def test_no_prompt_id_and_no_text_crosses_splits_in_any_language(tmp_path, packages):
    root = prepare("prompts", tmp_path / "prompts")
    ids, texts = {}, {}
    for split in ("train", "dev", "test"):
        rows = _rows(root, f"speech_{split}")
        for row in rows:
            assert ids.setdefault(row["prompt_id"], split) == split
            for key in ("text", "translation"):
                if key in row:
                    assert texts.setdefault(fold(row[key]), split) == split
    assert {"extension", "no"} <= texts.keys()  # in two languages each, and under several ids
    for number in range(len(NEARLY_ENGLISH)):
        assert ids[f"en-word{number}"] == ids[f"es-word{number}"]
    assert len({ids[f"vm-item{n}"] for n in range(0, SHARED, 10)}) == 1


def test_text_holds_no_dev_or_test_prompt(tmp_path, packages):
    root = prepare("prompts", tmp_path / "prompts")
    lines = [line for name in ("train", "dev") for line in (root / "text" / f"{name}.txt").read_text().splitlines()]
    assert {"in the beginning", "such a fine thing", "en el principio crió"} <= set(lines)
    held_out = [row["text"] for split in ("dev", "test") for row in _rows(root, f"speech_{split}")]
    long = [text for text in held_out if len(text.split()) >= 3]
    assert long
    assert not [line for line in lines if any(f" {fold(text)} " in f" {fold(line)} " for text in long)]
    train = [row["text"] for row in _rows(root, "en_train") if len(row["text"].split()) >= 3]
    assert all(f"and he said {text}" in lines for text in train)
    left_out = json.loads((root / "corpus.json").read_text())["text"]["left_out"]
    assert left_out["no words, or a number that can be read in several ways"] == 1
    assert left_out["text of a dev or test prompt"] >= len(set(long))


def test_splits_are_the_same_whatever_the_languages(tmp_path, packages):
    everything = prepare("prompts", tmp_path / "all")
    one = prepare("prompts", tmp_path / "one", languages=["fr"])
    for split in ("train", "dev", "test"):
        assert _rows(one, f"fr_{split}") == _rows(everything, f"fr_{split}")
    assert not (one / "audio" / "en").exists()
    assert "asterisk-core-sounds-es-g722" not in packages[-1]
    calls = len(packages)
    prepare("prompts", one)  # as a training does, which does not name the languages
    assert len(packages) == calls
    prepare("prompts", one, languages=["en", "fr"])
    assert len(packages) == calls + 1
    assert {row["lang"] for row in _rows(one, "speech_train")} == {"en", "fr"}


def test_the_second_call_fetches_nothing_and_the_third_of_a_lost_file_gives_the_same_bytes(tmp_path, packages):
    root = prepare("prompts", tmp_path / "prompts")
    before = {path.relative_to(root): sha256(path) for path in root.rglob("*.*") if path.is_file()}
    prepare("prompts", root)
    assert len(packages) == 1
    (root / "manifests" / "es_dev.json").unlink()
    (root / "audio" / "en" / "vm-item1.wav").write_bytes(b"RIFF, cut off")
    prepare("prompts", root)
    assert len(packages) == 2
    assert {path.relative_to(root): sha256(path) for path in root.rglob("*.*") if path.is_file()} == before


def test_an_unknown_language_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"languages \['de'\]: expected some of en, es, fr"):
        prepare("prompts", tmp_path, languages=["de"])
    assert not list(tmp_path.iterdir())


def test_a_package_without_its_transcripts_is_an_error(tmp_path):
    deb = write_deb(tmp_path / "asterisk-core-sounds-en_2_all.deb", {"usr/share/doc/other.txt": b""})
    with pytest.raises(CorpusError, match=r"no core-sounds-en\.txt"):
        prompts._transcripts(deb, "en")


def test_g722_keeps_time_and_shape_of_a_signal():
    """Two samples a byte; a coded tone comes back, a few samples late, at more than 25 dB."""
    samples = _tone(0.5)
    coded = _encode(samples)
    decoded = np.frombuffer(prompts.decode_g722(coded), "<i2").astype(float)
    assert len(decoded) == 2 * len(coded) == len(samples)
    errors = []
    for delay in range(40):
        kept = samples[1000 : len(samples) - 40].astype(float)
        shifted = decoded[1000 + delay : len(samples) - 40 + delay]
        errors.append(10 * np.log10(np.mean(kept**2) / np.mean((shifted - kept) ** 2)))
    assert max(errors) > 25
