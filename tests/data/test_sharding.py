"""Shards: what NeMo reads, the same bytes after kills, and every kind of damage found."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from corpus_helpers import sentence, write_manifest

from nemo_slam.data import one_shard, sharding
from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.config import SpeechConfig, TextConfig
from nemo_slam.data.shard_files import damaged_beside
from nemo_slam.data.sharding import ShardSettings, make_shards, read_corpus, verify
from nemo_slam.data.speech import SpeechStream
from nemo_slam.data.text import TextStream
from nemo_slam.data.token_shards import make_token_files

ROOT = Path(__file__).resolve().parents[2]
ROWS = 200


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8000, 8000, round(16000 * seconds), dtype=np.int16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """200 utterances of noise: 160 files, and 40 rows that are stretches of two long recordings."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "audio").mkdir()
    rows = []
    for i in range(ROWS - 40):
        seconds = 0.3 + 0.01 * (i % 30)
        suffix = "flac" if i % 3 else "wav"
        soundfile.write(folder / f"audio/u.{i}.{suffix}", noise(seconds, i), 16000, subtype="PCM_16")
        rows.append({"audio_filepath": f"audio/u.{i}.{suffix}", "duration": seconds, "text": f"row {i}", "speaker": i})
    for long in range(2):
        soundfile.write(folder / f"long-sub{long}.wav", noise(10, 1000 + long), 16000, subtype="PCM_16")
        for i in range(20):
            row = {"audio_filepath": f"long-sub{long}.wav", "duration": 0.4, "offset": 0.5 * i, "text": f"{long} {i}"}
            rows.append(row)
    write_manifest(folder / "manifest.json", rows)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is part of the corpus, by name."""
    names = read_corpus(folder)["files"]
    return {name: (folder / name).read_bytes() for name in [*names, "shards.json", "plan.json"]}


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    made = make_shards([corpus / "manifest.json"], out, ShardSettings(7), workers=2)
    assert (made["rows"], made["filtered"], made["bad"]) == (ROWS, 0, [])
    return out


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_is_there_once_with_its_own_samples(corpus, shards):
    """Against the source files, read by soundfile; members by tarfile, at the offsets of the index."""
    source = {row["text"]: row for row in rows_of(corpus / "manifest.json")}
    seen = []
    for shard in range(7):
        offsets = np.fromfile(shards / f"audio_{shard}.tar.idx", "<u8")
        rows = rows_of(shards / "sharded_manifests" / f"manifest_{shard}.json")
        assert len(rows) in (28, 29)
        for row, offset in zip(rows, offsets[:-1], strict=True):
            with open(shards / f"audio_{shard}.tar", "rb") as file:
                file.seek(int(offset))
                header = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict")
                audio, rate = soundfile.read(io.BytesIO(file.read(header.size)), dtype="int16")
            original = source[row["text"]]
            start = round(16000 * original.get("offset", 0))
            expected, _ = soundfile.read(corpus / original["audio_filepath"], dtype="int16")
            assert np.array_equal(audio, expected[start : start + round(16000 * original["duration"])])
            assert header.name == row["audio_filepath"]
            assert header.name.count(".") == 1
            assert "-sub" not in header.name
            assert (row["shard_id"], rate, row.get("speaker")) == (shard, 16000, original.get("speaker"))
            assert row.get("source_audio_offset") == original.get("offset")
            seen.append(row["text"])
    assert sorted(seen) == sorted(source)
    assert seen != list(source)  # shuffled
    assert rows_of(shards / "tarred_audio_manifest.json")[0]["shard_id"] == 0
    assert [row["text"] for row in rows_of(shards / "tarred_audio_manifest.json")] == seen


def test_our_stream_reads_them_as_it_reads_the_files(corpus, shards):
    plain = SpeechStream(SpeechConfig([str(corpus / "manifest.json")], 2000), seed=0)
    tarred = SpeechStream(
        SpeechConfig(
            [str(shards / "sharded_manifests" / "manifest__OP_0..6_CL_.json")],
            2000,
            tarred_audio_filepaths=[str(shards / "audio__OP_0..6_CL_.tar")],
        ),
        seed=0,
    )

    def fingerprints(stream: SpeechStream) -> list[tuple[int, float]]:
        batch = stream.load(np.arange(ROWS), np.zeros(ROWS, np.int64))
        assert len(batch) == ROWS
        pairs = zip(batch.audio_lengths.tolist(), batch.audio.double().square().sum(1).tolist(), strict=True)
        return sorted((length, round(energy, 6)) for length, energy in pairs)

    assert fingerprints(plain) == fingerprints(tarred)


def test_nemo_reads_them(corpus, shards):
    from nemo.collections.common.data.lhotse.indexed_adapters import _load_index
    from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoTarredIterator

    cuts = list(
        LazyNeMoTarredIterator(
            str(shards / "sharded_manifests" / "manifest__OP_0..6_CL_.json"), str(shards / "audio__OP_0..6_CL_.tar")
        )
    )
    source = {row["text"]: row for row in rows_of(corpus / "manifest.json")}
    assert sorted(cut.supervisions[0].text for cut in cuts) == sorted(source)
    for cut in cuts[::17]:
        row = source[cut.supervisions[0].text]
        expected, _ = soundfile.read(corpus / row["audio_filepath"], dtype="float32")
        start = round(16000 * row.get("offset", 0))
        wanted = torch.from_numpy(expected[start : start + round(16000 * row["duration"])])
        assert torch.equal(torch.from_numpy(cut.load_audio()[0]), wanted)
    offsets, count = _load_index(str(shards / "audio_0.tar"))
    assert (count, offsets[-1]) == (28, (shards / "audio_0.tar").stat().st_size)


def run_killed(command: list[str], when: Callable[[], bool]) -> int:
    """Runs a command in a process group of its own that is killed as soon as ``when()`` holds; its status."""
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not when():
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def test_killed_on_the_way_and_restarted_gives_the_same_bytes(corpus, shards, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "scripts/shard_data.py", "audio", str(corpus / "manifest.json")]
    command += ["--out", str(out), "--shards", "7", "--workers", "1"]
    # At once; when a shard is being written; after one, three, five of the seven.
    stages: list[Callable[[], bool]] = [lambda: True, lambda: any(out.rglob("*.part-*"))]
    stages += [lambda n=n: len(list(out.glob("*.tar"))) >= n for n in (1, 3, 5)]
    statuses = [run_killed(command, stage) for stage in stages]
    assert set(statuses) <= {0, -signal.SIGKILL}
    assert statuses.count(-signal.SIGKILL) >= 2
    assert run_killed(command, lambda: False) == 0
    assert contents(out) == contents(shards)
    assert not list(out.rglob("*.part-*"))
    assert verify(out) == []


def test_a_shard_with_a_record_is_not_made_again(corpus, shards, tmp_path):
    out = shutil.copytree(shards, tmp_path / "out")
    (out / "shards.json").unlink()
    (out / "audio_3.tar").unlink()
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    make_shards([corpus / "manifest.json"], out, ShardSettings(7), workers=1)
    assert {path.name: path.stat().st_ino for path in out.glob("*.tar") if path.name != "audio_3.tar"} == before
    assert contents(out) == contents(shards)
    started = time.monotonic()
    make_shards([corpus / "manifest.json"], out, ShardSettings(7), workers=1)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("name", ["audio_2.tar", "audio_2.tar.idx", "sharded_manifests/manifest_2.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_verify_names_a_damaged_file(shards, tmp_path, name, damage):
    out = shutil.copytree(shards, tmp_path / "out")
    path = out / name
    blob = bytearray(path.read_bytes())
    if damage == "flipped":
        blob[len(blob) // 2] ^= 4
    path.write_bytes(blob[:-7] if damage == "cut" else blob)
    if damage == "missing":
        path.unlink()
    (problem,) = verify(out)
    assert problem.startswith(f"{path}: ")
    (out / "shards.json").write_text("{")
    with pytest.raises(DataError, match=r"shards\.json is damaged"):
        verify(out)


def test_the_script_verifies(shards, tmp_path):
    command = [sys.executable, "scripts/shard_data.py", "verify"]
    assert "as it was written" in subprocess.run([*command, str(shards)], cwd=ROOT, capture_output=True).stdout.decode()
    out = shutil.copytree(shards, tmp_path / "out")
    (out / "audio_5.tar").write_bytes(bytes(10240))
    result = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"error: {out / 'audio_5.tar'}: 10240 bytes, written with" in result.stderr


def test_an_error_ends_the_work_at_once(corpus, tmp_path):
    (tmp_path / "out" / "audio_0.tar").mkdir(parents=True)  # where the first shard cannot be put
    command = [sys.executable, "scripts/shard_data.py", "audio", str(corpus / "manifest.json")]
    command += ["--out", str(tmp_path / "out"), "--shards", "100", "--workers", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: [Errno 21] Is a directory" in result.stderr
    assert len(list((tmp_path / "out" / ".records").iterdir())) < 50


def test_bad_rows_are_listed_and_the_others_kept(tmp_path):
    soundfile.write(tmp_path / "good.wav", noise(1, 0), 16000)
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    rows = [
        {"audio_filepath": "good.wav", "duration": 1.0},
        {"audio_filepath": "torn.wav", "duration": 1.0},
        {"audio_filepath": "gone.wav", "duration": 1.0},
        {"audio_filepath": "good.wav", "duration": 3.0},
        {"audio_filepath": "good.wav", "duration": 9.0},
        "{",
    ]
    manifest = write_manifest(tmp_path / "m.json", rows)
    made = make_shards([manifest], tmp_path / "out", ShardSettings(2, max_duration=5.0), workers=1)
    assert (made["rows"], made["filtered"]) == (1, 1)
    assert sorted(bad["line"] for bad in made["bad"]) == [2, 3, 4, 6]
    reasons = {bad["line"]: bad["reason"] for bad in made["bad"]}
    assert "not readable as audio" in reasons[2]
    assert "1.000 s long, the row ends at 3.000 s" in reasons[4]
    assert verify(tmp_path / "out") == []


def test_audio_that_vanishes_on_the_way_is_no_bad_row(tmp_path, monkeypatch):
    (tmp_path / "audio").mkdir()
    for i in range(8):
        soundfile.write(tmp_path / f"audio/{i}.wav", noise(0.5, i), 16000)
    manifest = write_manifest(
        tmp_path / "m.json", [{"audio_filepath": f"audio/{i}.wav", "duration": 0.5} for i in range(8)]
    )
    settings, out = ShardSettings(2, seed=None), tmp_path / "out"
    real, calls = one_shard.make_member, []

    def make_member(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            (tmp_path / "audio").rename(tmp_path / "gone")
        return real(*arguments)

    (out / "sharded_manifests").mkdir(parents=True)
    places = sharding._scan([manifest], settings).places
    monkeypatch.setattr(one_shard, "make_member", make_member)
    with pytest.raises(DataError, match=r"shard 0: 2 of 4 rows cannot be read.*2\.wav.*still there"):
        one_shard.make_shard([manifest], places[:4], 0, out, 0, settings.codec, "id", places)
    assert not (out / ".records").exists()
    with pytest.raises(DataError, match=r"4 of 4 rows cannot be read"):  # gone before its first row
        make_shards([manifest], out, settings, workers=1)
    (tmp_path / "gone").rename(tmp_path / "audio")
    assert make_shards([manifest], out, settings, workers=1)["rows"] == 8


def test_flac_for_all_is_the_same_sound(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1, 0), 16000, subtype="PCM_16")
    manifest = write_manifest(tmp_path / "m.json", [{"audio_filepath": "a.wav", "duration": 1.0}])
    make_shards([manifest], tmp_path / "out", ShardSettings(1, codec="flac"), workers=1)
    with tarfile.open(tmp_path / "out/audio_0.tar") as tar:
        (member,) = tar
        audio, _ = soundfile.read(io.BytesIO(tar.extractfile(member).read()), dtype="int16")
    assert member.name == "000000000_a.flac"
    assert np.array_equal(audio, noise(1, 0))


@pytest.mark.parametrize(("suffix", "subtype"), [("wav", "FLOAT"), ("wav", "DOUBLE"), ("ogg", "OPUS"), ("mp3", None)])
def test_floating_point_and_compressed_audio_keeps_its_level(tmp_path, suffix, subtype):
    """Whole and cut out, against what soundfile reads of the source."""
    sound = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    sound += np.random.default_rng(0).normal(0, 0.05, 48000)
    soundfile.write(tmp_path / f"a.{suffix}", sound, 48000, subtype=subtype)
    source, _ = soundfile.read(tmp_path / f"a.{suffix}")
    rows = [{"audio_filepath": f"a.{suffix}", "duration": len(source) / 48000}]
    rows.append({"audio_filepath": f"a.{suffix}", "duration": 0.5, "offset": 0.25})
    manifest = write_manifest(tmp_path / "m.json", rows)
    made = make_shards([manifest], tmp_path / "out", ShardSettings(1, seed=None, codec="flac"), workers=1)
    assert made["bad"] == []
    with tarfile.open(tmp_path / "out/audio_0.tar") as tar:
        whole, part = (soundfile.read(io.BytesIO(tar.extractfile(member).read()))[0] for member in tar)
    np.testing.assert_allclose(whole, source, atol=1e-6)
    # A decoder that starts in the middle lacks what the samples before would have left over.
    np.testing.assert_allclose(part, source[12000:36000], atol=0.02 if suffix in ("ogg", "mp3") else 1e-6)


def test_audio_that_cannot_be_read_by_name_or_by_place_is_one_bad_row(tmp_path):
    (tmp_path / "headless.raw").write_bytes(bytes(32000))
    soundfile.write(tmp_path / "speech.wav", np.full(8000, 0.5), 8000, subtype="GSM610")
    soundfile.write(tmp_path / "good.wav", noise(1, 0), 16000)
    rows = [
        {"audio_filepath": "headless.raw", "duration": 1.0},
        {"audio_filepath": "speech.wav", "duration": 1.0},
        {"audio_filepath": "good.wav", "duration": 0.02, "offset": 1.01},
    ]
    manifest = write_manifest(tmp_path / "m.json", rows)
    made = make_shards([manifest], tmp_path / "out", ShardSettings(1, codec="flac"), workers=1)
    assert (made["rows"], sorted(bad["line"] for bad in made["bad"])) == (1, [1, 3])


def test_other_settings_in_the_same_folder_are_refused(corpus, shards, tmp_path):
    with pytest.raises(DataError, match="holds shards made otherwise: shards, codec changed"):
        make_shards([corpus / "manifest.json"], shards, ShardSettings(8, codec="flac"), workers=1)
    with pytest.raises(DataError, match="200 usable rows for 300 shards"):
        make_shards([corpus / "manifest.json"], tmp_path / "out", ShardSettings(300), workers=1)
    with pytest.raises(DataError, match="not finished"):
        verify(tmp_path / "out")


# ---- token files ---------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    """Plain text with a byte-order mark, blank and undecodable lines and no last newline; JSON-lines."""
    lines = [sentence(i, 1 + i % 30).encode() for i in range(900)]
    lines[400:400] = [b"", b"\xff\xfe", b"\xe4\xb8\x80\xe4\xb8\x80"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    write_manifest(tmp_path / "b.jsonl", [*({"text": sentence(2000 + i, 5)} for i in range(300)), "{"])
    return [tmp_path / "a.txt", tmp_path / "b.jsonl"]


def text_config(texts, cache) -> TextConfig:
    return TextConfig([str(path) for path in texts], 100, max_tokens=24, min_tokens=3, cache_dir=str(cache))


def test_token_files_are_those_of_training(texts, tokenizer, tmp_path):
    alone = TextStream(text_config(texts, tmp_path / "alone"), tokenizer, seed=0).index
    config = text_config(texts, tmp_path / "together")
    (tmp_path / "together").mkdir()
    index = make_token_files(config, tokenizer, tmp_path / "work", workers=1, piece_bytes=5000)
    assert index.folder.name == alone.folder.name
    names = sorted(path.name for path in alone.folder.iterdir())
    assert "tokens.bin" in names
    assert sorted(path.name for path in index.folder.iterdir()) == sorted([*names, "checksums.json"])
    for name in names:
        if name != "meta.json":  # its counts may be in another order
            assert (index.folder / name).read_bytes() == (alone.folder / name).read_bytes(), name
    assert index.meta == alone.meta
    assert index.meta["bad"] == 3
    assert not list((tmp_path / "work").iterdir())
    opened = TextStream(config, tokenizer, seed=0)  # without building: the folder stays the same one
    assert opened.index.folder == index.folder
    assert damaged_beside(index.folder) == []

    blob = bytearray((index.folder / "tokens.bin").read_bytes())
    blob[1000] ^= 1
    (index.folder / "tokens.bin").write_bytes(blob)
    (problem,) = damaged_beside(index.folder)
    assert "tokens.bin: corrupted" in problem


def test_a_killed_tokenisation_keeps_its_pieces(texts, tokenizer, tmp_path, monkeypatch, caplog):
    from nemo_slam.data import token_shards

    (tmp_path / "cache").mkdir()
    config, merge = text_config(texts, tmp_path / "cache"), token_shards._merge

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(token_shards, "_merge", killed)
    with pytest.raises(KeyboardInterrupt):
        make_token_files(config, tokenizer, tmp_path / "work", workers=1, piece_bytes=20_000)
    pieces = sorted((tmp_path / "work").glob("*/0*"))
    assert len(pieces) > 3
    shutil.rmtree(pieces[1])
    monkeypatch.setattr(token_shards, "_merge", merge)
    with caplog.at_level("INFO"):
        index = make_token_files(config, tokenizer, tmp_path / "work", workers=1, piece_bytes=20_000)
    assert f"{len(pieces) - 1} of {len(pieces)} pieces are there already" in caplog.text
    alone = TextStream(text_config(texts, tmp_path / "alone"), tokenizer, seed=0).index
    assert index.meta == alone.meta
