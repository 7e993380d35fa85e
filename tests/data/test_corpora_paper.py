"""The paper's corpora, each on a miniature of its real folders."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import lhotse
import numpy as np
import pytest
import soundfile

from nemo_slam.data.corpora import parts, prepare
from nemo_slam.data.corpora.files import CorpusError
from nemo_slam.data.corpora.libri_light import windows


def rows(root, name):
    return [json.loads(line) for line in (root / "manifests" / f"{name}.json").read_text(encoding="utf-8").splitlines()]


def marker(root):
    return json.loads((root / "corpus.json").read_text())


def noise(path, seconds, rate=16000, channels=1, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(len(path.name)).normal(0, 0.05, (round(seconds * rate), channels))
    soundfile.write(path, samples, rate, **options)
    return path


@pytest.fixture
def librispeech(tmp_path):
    """PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac and .trans.txt, upper case; one part is missing."""
    source = tmp_path / "LibriSpeech"
    parts = {"train-clean-100": 103, "train-other-500": 20, "dev-clean": 84, "dev-other": 116, "test-clean": 61}
    for part, speaker in parts.items():
        folder = source / part / str(speaker) / "1240"
        names = [f"{speaker}-1240-{number:04d}" for number in range(2)]
        for number, name in enumerate(names):
            noise(folder / f"{name}.flac", 0.3 + 0.1 * number)
        lines = f"{names[0]} CHAPTER ONE OF {part.split('-')[1].upper()}\n{names[1]} IT'S MISSUS RACHEL LYNDE\n"
        (folder / f"{speaker}-1240.trans.txt").write_text(lines)
    return source


def test_librispeech(tmp_path, librispeech, caplog):
    root = prepare("librispeech", tmp_path / "out", source=librispeech)
    assert "lacks train-clean-360, test-other" in caplog.text
    assert {p.stem for p in (root / "manifests").iterdir()} == {
        *("train", "train_clean_100", "train_other_500", "dev", "dev_clean", "dev_other", "test_clean")
    }
    assert [row["id"] for row in rows(root, "train")] == [f"{s}-1240-000{n}" for s, n in product((103, 20), (0, 1))]
    assert len(rows(root, "dev")) == 4
    first, second = rows(root, "dev_other")
    assert first["text"] == "chapter one of other"
    assert second["text"] == "it's missus rachel lynde"
    assert second["speaker"] == "116"
    assert soundfile.info(second["audio_filepath"]).duration == second["duration"] == pytest.approx(0.4)
    assert marker(root)["speech"]["train"] == {"utterances": 4, "hours": pytest.approx(1.4 / 3600, abs=1e-4)}
    before = (root / "corpus.json").stat().st_mtime_ns
    prepare("librispeech", root, source=librispeech)
    assert (root / "corpus.json").stat().st_mtime_ns == before


def test_librispeech_of_the_wrong_folder(tmp_path, librispeech):
    with pytest.raises(CorpusError, match=r"none of train-clean-100, .* is there"):
        prepare("librispeech", tmp_path / "out", source=librispeech.parent)
    with pytest.raises(CorpusError, match="is not a folder: expected the LibriSpeech folder"):
        prepare("librispeech", tmp_path / "out", source=tmp_path / "none")


def test_librispeech_says_what_is_not_unpacked_completely(tmp_path, librispeech, caplog):
    prepare("librispeech", tmp_path / "out", source=librispeech)
    assert "train-clean-100 holds 2 of 28539 utterances" in caplog.text
    (librispeech / "train-clean-360").mkdir()
    with pytest.raises(CorpusError, match=r"train-clean-360 cannot be read .*unpacked completely"):
        prepare("librispeech", tmp_path / "empty", source=librispeech)
    (librispeech / "train-clean-360").rmdir()
    (librispeech / "test-clean/61/1240/61-1240-0001.flac").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"(?s)test-clean cannot be read .*61-1240-0001.flac.*unpacked completely"):
        prepare("librispeech", tmp_path / "empty", source=librispeech)


def test_libri_light(tmp_path):
    """PART/READER/BOOK/NAME.flac beside NAME.json with its voice activity."""
    source = tmp_path / "flac" / "librilight"
    speech = {"small": [[0.2, 1.0], [1.1, 2.4], [3.6, 4.4]], "medium": [[0.0, 9.0]]}
    for (part, stretches), reader in zip(speech.items(), ("100", "207"), strict=True):
        path = noise(source / part / reader / "sea_fairies_64kb" / "01_baum.flac", 9.0)
        path.with_suffix(".json").write_text(json.dumps({"speaker": reader, "voice_activity": stretches, "snr": 9.1}))
    broken = noise(source / "small" / "100" / "sea_fairies_64kb" / "02_baum.flac", 1.0)
    broken.with_suffix(".json").write_text("{")
    empty = source / "small" / "100" / "sea_fairies_64kb" / "03_baum.flac"  # as where unpacking was cut off
    empty.touch()
    empty.with_suffix(".json").write_text(json.dumps({"speaker": "100", "voice_activity": [[0.0, 1.0]]}))
    kept = tmp_path / "storage" / "01_baum.flac"  # a link to elsewhere, the JSON beside the link
    kept.parent.mkdir()
    moved = source / "medium" / "207" / "sea_fairies_64kb" / "01_baum.flac"
    moved.rename(kept)
    moved.symlink_to(kept)

    root = prepare("libri_light", tmp_path / "out", source=source, max_seconds=4)
    found = [(row["speaker"], row["offset"], round(row["offset"] + row["duration"], 3)) for row in rows(root, "train")]
    assert found == [("100", 0.2, 2.4), ("100", 3.6, 4.4), ("207", 0.0, 3.0), ("207", 3.0, 6.0), ("207", 6.0, 9.0)]
    assert [len(rows(root, part)) for part in ("small", "medium")] == [2, 3]
    assert "text" not in rows(root, "train")[0]
    assert rows(root, "small")[0]["id"] == "small/100/sea_fairies_64kb/01_baum"
    assert sum(marker(root)["left_out"].values()) == 2
    # and what the speech stream makes of it
    from nemo_slam.data.config import SpeechConfig
    from nemo_slam.data.speech import SpeechStream

    config = SpeechConfig([str(root / "manifests" / "train.json")], frames_per_step=10_000, min_duration=0.5)
    batch = SpeechStream(config, seed=0).batch(0, once=True)
    assert sorted(batch.audio_lengths.tolist()) == [12800, 35200, 48000, 48000, 48000]


@pytest.mark.parametrize("corpus", ["libri_light", "covost2"])
def test_audio_that_vanishes_on_the_way_is_not_left_out(tmp_path, covost, monkeypatch, corpus):
    source, translations = covost
    options = {"translations": translations, "pairs": ["en_de"]}
    if corpus == "libri_light":
        source, options = tmp_path / "librilight", {}
        for name in ("01", "02", "03", "04"):
            path = noise(source / "small" / "100" / "book" / f"{name}.flac", 2.0)
            path.with_suffix(".json").write_text(json.dumps({"speaker": "100", "voice_activity": [[0.0, 2.0]]}))
    real, calls = soundfile.info, []

    def info(path):
        calls.append(path)
        if len(calls) == 3:
            source.rename(tmp_path / "gone")
        return real(path)

    monkeypatch.setattr(soundfile, "info", info)
    monkeypatch.setattr(parts, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    with pytest.raises(CorpusError, match="is gone, and was there before"):
        prepare(corpus, tmp_path / "out", source=source, **options)
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_windows_join_neighbours_and_cut_what_is_longer():
    assert list(windows([(5.0, 6.0), (0.0, 1.0), (1.5, 2.0), (2.0, 2.0)], 30.0)) == [(0.0, 2.0), (5.0, 6.0)]
    pieces = list(windows([(1.0, 62.0)], 30.0))
    assert max(end - start for start, end in pieces) <= 30.0
    assert (pieces[0][0], pieces[-1][1], len(pieces)) == (1.0, 62.0, 3)


@pytest.mark.parametrize("packed", [True, False])
def test_librispeech_lm(tmp_path, packed):
    text = "A CHAPTER OF  ADVENTURES\n\n" + "".join(f"LINE {i}\n" for i in range(20_000))
    source = tmp_path / "lm"
    source.mkdir()
    if packed:
        (source / "librispeech-lm-norm.txt.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (source / "librispeech-lm-norm.txt").write_text(text)
    root = prepare("librispeech_lm", tmp_path / "out", source=source)
    train, dev = ((root / "text" / f"{name}.txt").read_text().splitlines() for name in ("train", "dev"))
    assert sorted([*train, *dev]) == sorted(["a chapter of adventures", *(f"line {i}" for i in range(20_000))])
    assert 0 < len(dev) < 20
    assert marker(root)["text"] == {"train": len(train), "dev": len(dev)}


def test_librispeech_lm_that_is_cut_off(tmp_path):
    whole = gzip.compress("".join(f"LINE {i}\n" for i in range(9000)).encode())
    (tmp_path / "librispeech-lm-norm.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"norm\.txt\.gz: cannot be read .*unfinished"):
        prepare("librispeech_lm", tmp_path / "out", source=tmp_path)
    assert not (tmp_path / "out" / "corpus.json").exists()
    with pytest.raises(CorpusError, match=r"expected librispeech-lm-norm\.txt\.gz of OpenSLR 11"):
        prepare("librispeech_lm", tmp_path / "out", source=tmp_path / "none")


def test_mc4(tmp_path):
    documents = [{"text": f"First of {i}.\n\n Cafe\u0301  number {i}. ", "timestamp": "", "url": ""} for i in range(6)]
    source = tmp_path / "en"
    source.mkdir()
    lines = [json.dumps(document) + "\n" for document in documents]
    (source / "c4-train.00000-of-00002.json.gz").write_bytes(gzip.compress("".join(lines[:4]).encode()))
    (source / "c4-train.00001-of-00002.json").write_text("".join(lines[4:]))
    root = prepare("mc4", tmp_path / "out", source=source)
    files = {path.stem: path.read_text().splitlines() for path in (root / "text").iterdir()}
    assert set(files) - {"dev"} == {"train_000", "train_001"}
    together = sorted(line for part in files.values() for line in part)
    assert together == sorted(line for i in range(6) for line in (f"First of {i}.", f"Café number {i}."))
    assert marker(root)["left_out"] == {"empty paragraph": 6}

    (source / "x.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(CorpusError, match=r"x\.jsonl:1: not a JSON object with the key 'text'"):
        prepare("mc4", tmp_path / "out", source=source)
    (source / "x.jsonl").unlink()
    path = source / "c4-train.00000-of-00002.json.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"00000-of-00002\.json\.gz: cannot be read .*unfinished"):
        prepare("mc4", tmp_path / "out", source=source)


def test_a_full_disk_is_no_unfinished_download(tmp_path, monkeypatch):
    (tmp_path / "librispeech-lm-norm.txt").write_text("LINE\n" * 100_000)
    monkeypatch.setattr(parts, "whole_file", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left on device"):
        prepare("librispeech_lm", tmp_path / "out", source=tmp_path)


@pytest.fixture
def covost(tmp_path):
    """cv-corpus/en/{clips,validated.tsv} and covost_v2.en_de.tsv, as both projects lay them out."""
    voices = tmp_path / "cv-corpus" / "en"
    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent\n"
    sentences = ['"These data components", in turn, serve.', "Two", "Three", "Four", "Never translated", "Five"]
    lines = [f"speaker{i}\tcommon_voice_en_{i}.mp3\t{text}\t2\t0\t\t\t\n" for i, text in enumerate(sentences)]
    for i in range(5):
        noise(voices / "clips" / f"common_voice_en_{i}.mp3", 1.0 + i, rate=48000, format="MP3")
    (voices / "clips" / "common_voice_en_5.mp3").write_text("no audio")
    (voices / "validated.tsv").write_text(header + "".join(lines), encoding="utf-8")
    splits = {0: "train", 1: "train_covost", 2: "dev", 3: "test", 5: "train", 9: "train"}
    translated = [f'common_voice_en_{i}.mp3\t"Übersetzung {i}"\t{split}\n' for i, split in splits.items()]
    (tmp_path / "covost_v2.en_de.tsv").write_text("path\ttranslation\tsplit\n" + "".join(translated), encoding="utf-8")
    return voices.parent, tmp_path


def test_covost2(tmp_path, covost):
    source, translations = covost
    root = prepare("covost2", tmp_path / "out", source=source, translations=translations, pairs=["en_de"])
    train = rows(root, "en_de_train")
    assert [row["translation"] for row in train] == ["Übersetzung 0", "Übersetzung 1"]
    assert train[0]["text"] == 'These data components", in turn, serve.'
    assert (train[1]["lang"], train[1]["target_lang"], train[1]["speaker"]) == ("en", "de", "speaker1")
    assert [rows(root, f"en_de_{split}")[0]["text"] for split in ("dev", "test")] == ["Three", "Four"]
    assert [round(row["duration"]) for row in train] == [1, 2]
    assert marker(root)["left_out"] == {"en_de: translated, but not in validated.tsv": 1, "en_de: no readable audio": 1}


def test_covost2_with_a_table_that_is_cut_off(tmp_path, covost):
    source, translations = covost
    table = source / "en" / "validated.tsv"
    text = table.read_text(encoding="utf-8")
    table.write_text(text[: text.index("common_voice_en_3.mp3") + len("common_voice_en_3.mp3")], encoding="utf-8")
    root = prepare("covost2", tmp_path / "out", source=source, translations=translations, pairs=["en_de"])
    assert marker(root)["left_out"] == {"en_de: translated, but not in validated.tsv": 2, "en_de: no text": 1}


def test_covost2_names_what_is_missing(tmp_path, covost):
    source, translations = covost
    with pytest.raises(CorpusError, match=r"covost_v2\.en_tr\.tsv does not exist: .*unpacked \(--translations\)"):
        prepare("covost2", tmp_path / "out", source=source, translations=translations, pairs=["en_tr"])
    with pytest.raises(CorpusError, match="--pairs german: expected source and target"):
        prepare("covost2", tmp_path / "out", source=source, pairs=["german"])
    (source / "en" / "validated.tsv").write_text("path\ttext\n")
    with pytest.raises(CorpusError, match=r"validated\.tsv: no column client_id, sentence; it has path, text"):
        prepare("covost2", tmp_path / "out", source=source, translations=translations, pairs=["en_de"])


def test_any_corpus_of_lhotse(tmp_path):
    """A call of two channels and a plain file, as `lhotse prepare` writes them."""
    call = noise(tmp_path / "sw02001.wav", 4.0, rate=8000, channels=2)
    plain = noise(tmp_path / "plain.wav", 2.0)
    recordings = lhotse.RecordingSet.from_recordings(
        lhotse.Recording.from_file(path, recording_id=path.stem) for path in (call, plain)
    )
    said = [("sw02001", 0.5, 1.0, 0, "HI UM"), ("sw02001", 1.0, 2.0, 1, "yes"), ("plain", 0.0, 2.0, 0, "Plain"),
            ("plain", 0.0, 1.0, 0, "")]  # fmt: skip
    supervisions = lhotse.SupervisionSet.from_segments(
        lhotse.SupervisionSegment(str(i), r, start, seconds, channel, text, language="English", speaker=f"s{channel}")
        for i, (r, start, seconds, channel, text) in enumerate(said)
    )
    recordings.to_file(tmp_path / "r.jsonl.gz")
    supervisions.to_file(tmp_path / "s.jsonl.gz")
    options = {"recordings": tmp_path / "r.jsonl.gz", "supervisions": tmp_path / "s.jsonl.gz"}
    root = prepare("lhotse", tmp_path / "out", **options, part="dev", lang="en", lower=True)
    found = rows(root, "dev")
    assert [(row["text"], row["offset"], row["duration"]) for row in found] == [
        *(("hi um", 0.5, 1.0), ("yes", 1.0, 2.0), ("plain", 0.0, 2.0))
    ]
    assert {row["lang"] for row in found} == {"en"}
    assert found[2]["audio_filepath"] == str(plain)
    original, _ = soundfile.read(call)
    for row, channel in zip(found[:2], (0, 1), strict=True):
        samples, rate = soundfile.read(root / "manifests" / row["audio_filepath"])
        assert (samples.ndim, rate, len(samples)) == (1, 16000, 64000)
        np.testing.assert_allclose(samples[8000:-8000:2].std(), original[4000:-4000, channel].std(), rtol=0.05)
        own, other = (abs(np.corrcoef(samples[::2][:32000], original[:, c])[0, 1]) for c in (channel, 1 - channel))
        assert own > 0.8 > 0.2 > other
    with pytest.raises(CorpusError, match=r"lhotse prepare CORPUS"):
        prepare("lhotse", tmp_path / "x", recordings=tmp_path / "none", supervisions=tmp_path / "none")
