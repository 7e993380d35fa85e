"""NeMo tarred audio, read by position."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from corpus_helpers import write_manifest, write_tone

from nemo_slam.data.bad_rows import BadRows, DataError, EmptyStreamError
from nemo_slam.data.config import PairsConfig, SpeechConfig
from nemo_slam.data.pairs import PairStream
from nemo_slam.data.speech import SpeechStream


def write_tars(folder, shards: dict[int, list[str]], suffix: str = "") -> None:
    for number, names in shards.items():
        with tarfile.open(folder / f"audio_{number}.tar{suffix}", f"w:{suffix.strip('.')}") as tar:
            for name in names:
                tar.add(folder / name, arcname=name)


@pytest.fixture
def corpus(tmp_path):
    """Six utterances in three tar files; the level tells which is which."""
    rows = []
    for i in range(6):
        write_tone(tmp_path / f"{i}.wav", 1.0 + i / 10, level=(i + 1) / 8)
        rows.append(
            {"audio_filepath": f"{i}.wav", "duration": 1.0 + i / 10, "shard_id": i // 2, "text": "bak" + "e" * i}
        )
    write_tars(tmp_path, {s: [f"{2 * s}.wav", f"{2 * s + 1}.wav"] for s in range(3)})
    write_manifest(tmp_path / "m.json", rows)
    return tmp_path


def config(corpus, cls=SpeechConfig, **options):
    return cls(
        [str(corpus / "m.json")], 2000, tarred_audio_filepaths=[str(corpus / "audio__OP_0..2_CL_.tar")], **options
    )


def test_members_are_what_the_files_are(corpus, tokenizer):
    plain = SpeechStream(SpeechConfig([str(corpus / "m.json")], 2000), seed=0)
    tarred = SpeechStream(config(corpus), seed=0)
    pairs = PairStream(config(corpus, PairsConfig), tokenizer, seed=0)
    expected = plain.batch(0)
    assert len(expected) > 6
    for i in range(6):
        (corpus / f"{i}.wav").unlink()
    assert torch.equal(tarred.batch(0).audio, expected.audio)
    assert torch.equal(tarred.batch(0).ids, expected.ids)
    ids, epochs = np.arange(6), np.zeros(6, np.int64)
    assert (pairs.load(ids, epochs).audio[:, 0] == (torch.arange(6) + 1) / 8).all()


def test_rows_that_share_a_recording(corpus):
    """NeMo names further rows of one recording <name>-sub<n>, and keeps their offsets."""
    write_manifest(
        corpus / "m.json",
        [
            {"audio_filepath": "5.wav", "duration": 0.5, "offset": 0.0},
            {"audio_filepath": "5-sub1.wav", "duration": 0.7, "offset": 0.5},
        ],
    )
    batch = SpeechStream(config(corpus), seed=0).load(np.arange(2), np.zeros(2, np.int64))
    assert batch.audio_lengths.tolist() == [8000, 11_200]
    assert (batch.audio[1] == 6 / 8).all()


def test_a_row_without_its_member(corpus):
    with open(corpus / "m.json", "a") as file:
        file.write(json.dumps({"audio_filepath": "lost.wav", "duration": 1.0}) + "\n")
    rows = BadRows(corpus / "bad_rows.jsonl")
    assert len(SpeechStream(config(corpus), seed=0, bad_rows=rows).index) == 6
    assert "lost.wav: in none of the tar files" in (corpus / "bad_rows.jsonl").read_text()


def test_a_corpus_without_a_member_lists_the_first_rows_alone(corpus, monkeypatch):
    """The wrong tar files for millions of rows: every rank would hold them all, to say that none is left."""
    monkeypatch.setattr("nemo_slam.data.stream._LISTED", 3)
    write_tars(corpus, {0: []})
    rows = BadRows(corpus / "bad_rows.jsonl")
    tars = [str(corpus / "audio_0.tar")]
    with pytest.raises(EmptyStreamError, match=r"bad: 6, 3 of them listed in .*m\.json:1: 0\.wav: in none of the tar"):
        SpeechStream(SpeechConfig([str(corpus / "m.json")], 9, tarred_audio_filepaths=tars), seed=0, bad_rows=rows)
    assert len(rows.path.read_text().splitlines()) == 3


def test_missing_shard(corpus):
    (corpus / "audio_1.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*audio_1\.tar \(No such file"):
        SpeechStream(config(corpus), seed=0)


@pytest.mark.parametrize("keep", [0, 100, 40_000])
def test_truncated_shard(corpus, keep):
    """Members that are whole stay; the others are bad rows that name the file."""
    whole = (corpus / "audio_1.tar").read_bytes()
    (corpus / "audio_1.tar").write_bytes(whole[:keep])
    rows = BadRows(corpus / "bad_rows.jsonl")
    stream = SpeechStream(config(corpus), seed=0, bad_rows=rows)
    lines = [json.loads(line) for line in rows.path.read_text().splitlines()]
    assert [r["line"] for r in lines] == [3, 4]
    assert all("audio_1.tar" in r["reason"] for r in lines)
    assert len(stream.batch(0)) > 0


@pytest.mark.parametrize("damage", ["overwritten", "cut between members"])
def test_a_shard_that_tarfile_thinks_ends_early_is_named(corpus, damage):
    whole = bytearray((corpus / "audio_1.tar").read_bytes())
    with tarfile.open(corpus / "audio_1.tar") as tar:
        second = tar.getmembers()[1].offset
    whole[second : second + 300] = b"x" * 300
    (corpus / "audio_1.tar").write_bytes(whole if damage == "overwritten" else whole[:second])
    rows = BadRows(corpus / "bad_rows.jsonl")
    SpeechStream(config(corpus), seed=0, bad_rows=rows)
    (line,) = (json.loads(line) for line in rows.path.read_text().splitlines())
    assert line["line"] == 4
    assert f"audio_1.tar: no header at byte {second}" in line["reason"]


def test_a_shard_truncated_after_the_index_was_built(corpus):
    rows = BadRows(corpus / "bad_rows.jsonl")
    stream = SpeechStream(config(corpus), seed=0, bad_rows=rows)
    whole = (corpus / "audio_2.tar").read_bytes()
    (corpus / "audio_2.tar").write_bytes(whole[:30_000])
    batch = stream.load(np.arange(6), np.zeros(6, np.int64))
    assert batch.ids.tolist() == [0, 1, 2, 3]
    assert "audio_2.tar:4.wav: the tar file ends" in rows.path.read_text()


def test_an_index_that_does_not_match_its_shards_is_built_anew(corpus, caplog):
    """Other members at the old places: without a look at the tar files a row would get another utterance's samples."""
    stream = SpeechStream(config(corpus), seed=0)
    expected = stream.load(np.arange(6), np.zeros(6, np.int64))
    before = (corpus / "audio_0.tar").stat()
    write_tars(corpus, {0: ["1.wav", "0.wav"]})
    assert (corpus / "audio_0.tar").stat().st_size == before.st_size
    found = SpeechStream(config(corpus), seed=0).load(np.arange(6), np.zeros(6, np.int64))
    assert "does not match its sources any more" in caplog.text
    assert torch.equal(found.audio, expected.audio)


def test_a_compressed_shard_is_refused_with_a_reason(corpus):
    write_tars(corpus, {0: ["0.wav"]}, ".gz")
    rows = BadRows(corpus / "bad_rows.jsonl")
    with pytest.raises(EmptyStreamError, match="'speech' is empty"):
        SpeechStream(
            SpeechConfig([str(corpus / "m.json")], 10, tarred_audio_filepaths=[str(corpus / "audio_0.tar.gz")]),
            seed=0,
            bad_rows=rows,
        )
    assert "audio_0.tar.gz: " in rows.path.read_text()


def test_folders_inside_a_tar(corpus):
    """The whole name decides, extension apart; a base name in a folder is another recording's."""
    with tarfile.open(corpus / "audio_0.tar", "w:") as tar:
        tar.add(corpus / "0.wav", arcname="one/x.wav")
        tar.add(corpus / "1.wav", arcname="two/x.wav")
        tar.add(corpus / "2.wav", arcname="two/y.wav")
    names = ["two/x.wav", "two/y.flac", "x.wav", "three/x.wav", "one/y.wav"]
    write_manifest(corpus / "m.json", [{"audio_filepath": n, "duration": 1.0} for n in names])
    rows = BadRows(corpus / "bad_rows.jsonl")
    tars = [str(corpus / "audio_0.tar")]
    stream = SpeechStream(SpeechConfig([str(corpus / "m.json")], 9, tarred_audio_filepaths=tars), seed=0, bad_rows=rows)
    batch = stream.load(np.arange(2), np.zeros(2, np.int64))
    assert batch.audio[:, 0].tolist() == [2 / 8, 3 / 8]
    lines = [json.loads(line) for line in rows.path.read_text().splitlines()]
    assert [(r["line"], r["reason"].split(" (")[0].split(": rows")[0]) for r in lines] == [
        (line, f"{name}: in none of the tar files") for line, name in list(enumerate(names, 1))[2:]
    ]


def test_one_name_in_two_shards(corpus):
    """As NeMo makes them where rows of one recording went to different shards: the row's shard decides, or nothing."""
    (corpus / "again").mkdir()
    write_tone(corpus / "again" / "0.wav", 1.0, level=7 / 8)
    with tarfile.open(corpus / "audio_2.tar", "a:") as tar:
        tar.add(corpus / "again" / "0.wav", arcname="0.wav")
    with open(corpus / "m.json", "a") as file:
        for shard in ({"shard_id": 2}, {}):
            file.write(json.dumps({"audio_filepath": "0.wav", "duration": 1.0, **shard}) + "\n")
    rows = BadRows(corpus / "bad_rows.jsonl")
    stream = SpeechStream(config(corpus), seed=0, bad_rows=rows)
    assert len(stream.index) == 7
    batch = stream.load(np.array([0, 6]), np.zeros(2, np.int64))
    assert batch.audio[:, 0].tolist() == [1 / 8, 7 / 8]
    (line,) = (json.loads(line) for line in rows.path.read_text().splitlines())
    assert line["line"] == 8
    assert "fits 2 members of the tar files" in line["reason"]


def test_a_row_that_is_left_out_keeps_its_member(corpus):
    """Too long for the stream, it is still whose audio that is."""
    with open(corpus / "m.json", "a") as file:
        file.write(json.dumps({"audio_filepath": "5.wav", "duration": 90.0}) + "\n")
        file.write(json.dumps({"audio_filepath": "other/5.wav", "duration": 1.5}) + "\n")
    rows = (corpus / "m.json").read_text().splitlines()
    write_manifest(corpus / "m.json", [r for r in rows if json.loads(r)["duration"] != 1.5 or "other" in r])
    with pytest.raises(DataError, match=r"^other/5\.wav: in .*audio_2\.tar .* a row of another name"):
        SpeechStream(config(corpus, max_duration=10), seed=0)


def test_nemo_reads_the_same(tmp_path):
    """Rows of one recording in two shards, each with it: every row's samples by stock NeMo, and by us."""
    from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoTarredIterator

    long = np.linspace(-0.9, 0.9, 48_000, dtype=np.float32)
    soundfile.write(tmp_path / "_data_long.wav", long, 16_000, subtype="FLOAT")
    write_tone(tmp_path / "_data_spk1_utt.wav", 1.1)
    shards = [
        [("_data_long.wav", 0.0, 1.0), ("_data_long-sub1.wav", 1.0, 0.5), ("_data_spk1_utt.wav", 0.0, 1.1)],
        [("_data_long.wav", 2.0, 0.8), ("_data_long-sub1.wav", 0.25, 1.25)],
    ]
    for shard, rows in enumerate(shards):
        write_tars(tmp_path, {shard: sorted({name.replace("-sub1", "") for name, _, _ in rows})})
        manifest = [{"audio_filepath": n, "offset": o, "duration": d, "shard_id": shard} for n, o, d in rows]
        write_manifest(tmp_path / f"manifest_{shard}.json", [{**row, "text": "a"} for row in manifest])
    manifests, tars = str(tmp_path / "manifest__OP_0..1_CL_.json"), str(tmp_path / "audio__OP_0..1_CL_.tar")
    cuts = [cut.load_audio()[0] for cut in LazyNeMoTarredIterator(manifests, tars)]
    stream = SpeechStream(SpeechConfig([manifests], 9, tarred_audio_filepaths=[tars]), seed=0)
    ours = [stream._audio.read(i) for i in range(len(stream.index))]
    assert len(cuts) == len(ours) == 5
    for mine, theirs in zip(sorted(ours, key=len), sorted(cuts, key=len), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
