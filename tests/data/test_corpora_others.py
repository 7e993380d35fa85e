"""The synthetic corpus, with eSpeak NG and without; mini LibriSpeech on a miniature of its folders."""

import json
import subprocess
import sys
import wave

import numpy as np
import pytest
import soundfile

from nemo_slam.data.corpora import espeak, prepare, synthetic
from nemo_slam.data.corpora.files import CorpusError
from nemo_slam.data.corpora.normalise import normalise

SPLITS = ("train", "dev", "test")


def _rows(root, name):
    return [json.loads(line) for line in (root / "manifests" / f"{name}.json").read_text(encoding="utf-8").splitlines()]


class _Beeper:
    """Stands in for eSpeak: as many samples as the text has letters, times 100."""

    def say(self, text, voice, rate, pitch):
        assert rate > 100
        assert 0 <= pitch <= 100
        return np.full(100 * len(text), 1000, np.int16)


def test_synthetic_is_labelled_parallel_and_split_by_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(espeak, "Espeak", _Beeper)
    root = prepare("synthetic", tmp_path / "s", sentences=60)
    marker = json.loads((root / "corpus.json").read_text())
    assert marker["synthetic"] is True
    english, where, voices = {}, {}, {}
    for split in SPLITS:
        rows = _rows(root, f"speech_{split}")
        assert rows
        for row in rows:
            assert row["synthetic"] is True
            assert where.setdefault(row["prompt_id"], split) == split
            assert normalise(row["text"], row["lang"]) == row["text"]
            voices.setdefault(row["lang"], set()).add(row["speaker"])
            if row["lang"] == "en":
                english[row["prompt_id"]] = row["text"]
            with wave.open(str(root / "manifests" / row["audio_filepath"])) as audio:
                assert audio.getnframes() == 100 * len(row["text"]) == round(row["duration"] * 16000)
    assert len(where) == 60
    assert all(len(set(used)) == 4 for used in voices.values())
    for split in SPLITS:
        assert all(
            row["translation"] == english[row["prompt_id"]]
            for row in _rows(root, f"speech_{split}")
            if row["lang"] != "en"
        )
    text = {line for name in ("train", "dev") for line in (root / "text" / f"{name}.txt").read_text().splitlines()}
    assert len(text) == 3 * 600
    assert not text & {row["text"] for split in SPLITS for row in _rows(root, f"speech_{split}")}


def test_the_grammar_has_no_two_equal_sentences():
    for column in zip(*synthetic._grammar(), strict=True):
        assert len(set(column)) == len(column) == 8 * 6 * 9 * 6 * 4


@pytest.mark.parametrize("sentences", [10, 2000])
def test_synthetic_names_how_many_sentences_it_has(tmp_path, sentences):
    with pytest.raises(ValueError, match=f"sentences {sentences}: expected 50 to 942"):
        prepare("synthetic", tmp_path, sentences=sentences)


@pytest.mark.parametrize("sequences", [-3, 0, 49])
def test_too_small_an_oracle_language_is_refused_and_a_finished_one_kept(tmp_path, sequences):
    root = prepare("oracle_language", tmp_path / "o", sequences=50)
    marker = (root / "corpus.json").read_text()
    assert all(_rows(root, f"speech_{split}") for split in SPLITS)
    with pytest.raises(ValueError, match=f"sequences {sequences}: expected at least 50"):
        prepare("oracle_language", root, sequences=sequences)
    assert (root / "corpus.json").read_text() == marker


def test_without_espeak_the_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(CorpusError, match="pip install espeakng-loader"):
        prepare("synthetic", tmp_path)


def test_espeak_speaks_every_voice():
    pytest.importorskip("espeakng_loader", reason="eSpeak NG (package espeakng-loader) is not installed")
    speaker = espeak.Espeak()
    heard = set()
    for voices in synthetic.VOICES.values():
        for voice in voices:
            samples = speaker.say("a b c d", voice)
            assert samples.dtype == np.int16
            assert 0.3 < len(samples) / 16000 < 4
            assert np.abs(samples.astype(int)).max() > 3000
            heard.add(samples.tobytes())
    assert len(heard) == 12
    slow, quick = (len(speaker.say("one two three four five", "en-us", rate=rate)) for rate in (100, 200))
    assert slow > 1.5 * quick
    with pytest.raises(CorpusError, match="set voice 'xx'"):
        speaker.say("hello", "xx")


def test_espeak_says_the_same_in_every_process():
    pytest.importorskip("espeakng_loader", reason="eSpeak NG (package espeakng-loader) is not installed")
    script = """
import hashlib
from nemo_slam.data.corpora.espeak import Espeak
speaker = Espeak()
print([hashlib.sha256(speaker.say(text, "es+f2").tobytes()).hexdigest() for text in ("hola mundo", "la casa")])
"""
    said = {subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout for _ in range(3)}
    assert len(said) == 1


def test_resample_keeps_a_tone():
    time = np.arange(22050) / 22050
    tone = (10000 * np.sin(2 * np.pi * 300 * time)).astype(np.int16)
    samples = espeak.resample(tone, 22050)
    assert samples.dtype == np.int16
    assert len(samples) == 16000
    expected = 10000 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)
    assert np.abs(samples[500:-500] - expected[500:-500]).max() < 30


@pytest.fixture
def librispeech(tmp_path):
    """A miniature of the real folders: SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac and .trans.txt, upper case."""
    source = tmp_path / "corpus" / "LibriSpeech"
    for part, speakers in (("train-clean-5", (1098, 116)), ("dev-clean-2", range(81, 96))):
        for speaker in speakers:
            folder = source / part / str(speaker) / "134315"
            folder.mkdir(parents=True)
            lines = ""
            for number in range(2):
                name = f"{speaker}-134315-{number:04d}"
                noise = np.random.default_rng(number).normal(0, 0.05, 4800 + 1600 * number)
                soundfile.write(folder / f"{name}.flac", noise, 16000)
                lines += f"{name} IT'S A LINE OF SPEAKER {'ABCDEFGHIJKLMNOPQRST'[speaker % 20]} AND {number}\n"
            (folder / f"{speaker}-134315.trans.txt").write_text(lines)
    return source


def test_mini_librispeech(tmp_path, librispeech):
    root = prepare("mini_librispeech", tmp_path / "corpus", source=librispeech)
    rows = {split: _rows(root, f"en_{split}") for split in SPLITS}
    assert [len(rows["train"]), len(rows["dev"]) + len(rows["test"])] == [4, 30]
    speakers = {split: {row["speaker"] for row in rows[split]} for split in SPLITS}
    assert speakers["train"] == {"1098", "116"}
    assert speakers["dev"]
    assert speakers["test"]
    assert not speakers["dev"] & speakers["test"]
    for split in SPLITS:
        for row in rows[split]:
            assert not row["audio_filepath"].startswith("/")
            assert soundfile.info(root / "manifests" / row["audio_filepath"]).duration == row["duration"]
    first = next(row for row in rows["train"] if row["prompt_id"] == "1098-134315-0000")
    assert first["text"] == "it's a line of speaker s and zero"
    text = [line for name in ("train", "dev") for line in (root / "text" / f"{name}.txt").read_text().splitlines()]
    assert sorted(text) == sorted({row["text"] for row in rows["train"]})


def test_mini_librispeech_outside_the_root_is_found_by_its_absolute_path(tmp_path, librispeech):
    root = prepare("mini_librispeech", tmp_path / "elsewhere", source=librispeech)
    assert all(row["audio_filepath"].startswith(str(librispeech)) for row in _rows(root, "speech_test"))


def test_mini_librispeech_with_a_part_missing(tmp_path, librispeech):
    (librispeech / "dev-clean-2").rename(librispeech / "dev-clean")
    with pytest.raises(CorpusError, match="no folder dev-clean-2; expected both parts"):
        prepare("mini_librispeech", tmp_path / "m", source=librispeech)


def test_mini_librispeech_offline_names_the_ways_out(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("name resolution failed")

    monkeypatch.setattr("lhotse.recipes.download_librispeech", offline)
    with pytest.raises(CorpusError, match=r"(?s)name resolution failed.*synthetic.*manifests"):
        prepare("mini_librispeech", tmp_path / "m")


def test_mini_librispeech_deletes_the_archives_that_it_downloaded_and_no_other(tmp_path, librispeech, monkeypatch):
    root = librispeech.parent
    (root / "mine.tar.gz").write_bytes(b"mine")
    (root / "train-clean-5.tar.gz").write_bytes(b"mine too")
    prepare("mini_librispeech", root, source=librispeech)
    assert {path.name for path in root.glob("*.tar.gz")} == {"mine.tar.gz", "train-clean-5.tar.gz"}
    (root / "corpus.json").unlink()
    monkeypatch.setattr("lhotse.recipes.download_librispeech", lambda *_, **__: librispeech)
    prepare("mini_librispeech", root)
    assert {path.name for path in root.glob("*.tar.gz")} == {"mine.tar.gz"}


def test_mini_librispeech_cut_off_on_the_way_is_said(tmp_path, monkeypatch):
    def cut(*_, **__):
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr("lhotse.recipes.download_librispeech", cut)
    with pytest.raises(CorpusError, match=r"cut off or is damaged .*The same command goes on"):
        prepare("mini_librispeech", tmp_path / "m")
