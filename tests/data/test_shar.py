"""lhotse Shar and tar files in an object store: what lhotse itself reads, in any order, and again after a resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
import torch
from corpus_helpers import sentence
from fsspec.implementations.memory import MemoryFileSystem
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.shar import SharWriter

from nemo_slam.data import remote
from nemo_slam.data.bad_rows import BadRows, DataError
from nemo_slam.data.config import PairsConfig, SpeechConfig
from nemo_slam.data.pairs import PairStream
from nemo_slam.data.remote import RemoteError
from nemo_slam.data.shar import find_shards, pattern, shar_manifests
from nemo_slam.data.speech import SpeechStream

ROOT = Path(__file__).resolve().parents[2]
CUTS = 11


@pytest.fixture(scope="module")
def shar(tmp_path_factory) -> Path:
    """Eleven cuts in three shards: stretches of recordings, every other with two supervisions; one has no audio."""
    folder = tmp_path_factory.mktemp("source")
    cuts = []
    for i in range(CUTS):
        noise = np.random.default_rng(i).integers(-8000, 8000, 40_000 + 800 * i, dtype=np.int16)
        soundfile.write(folder / f"{i}.wav", noise, 16000, subtype="PCM_16")
        recording = Recording.from_file(folder / f"{i}.wav")
        said = [
            SupervisionSegment(f"{i}-{k}", recording.id, k, 1.0, text=sentence(10 * i + k, 3), language="xx")
            for k in range(1 + i % 2)
        ]
        cut = MonoCut(f"a/cut.{i}", 0, recording.duration, 0, recording=recording, supervisions=said)
        cuts.append(cut.truncate(offset=0.2 * (i % 3), preserve_id=True))
    cuts[4].recording = None
    (folder / "shar").mkdir()
    with SharWriter(folder / "shar", fields={"recording": "flac"}, shard_size=4) as writer:
        for cut in cuts:
            writer.write(cut)
    return folder / "shar"


@pytest.fixture
def bucket(shar):
    """The same Shar at a URL."""
    store = fsspec.filesystem("memory")
    store.put(str(shar), "/bucket/shar", recursive=True)
    yield "memory://bucket/shar"
    store.rm("/bucket", recursive=True)


def config(made, cls=SpeechConfig, cache_dir=None):
    tars = made["tars"]
    return cls([made["manifests"]], 900, tarred_audio_filepaths=[tars], cache_dir=cache_dir and str(cache_dir))


def test_each_cut_is_what_lhotse_reads(shar, tmp_path, tokenizer):
    made = shar_manifests(str(shar), tmp_path)
    assert (made["rows"], made["without_audio"]) == (CUTS - 1, 1)
    expected = {cut.id: cut for cut in CutSet.from_shar(in_dir=shar) if cut.has_recording}
    assert made["hours"] == pytest.approx(sum(cut.duration for cut in expected.values()) / 3600)
    pairs = PairStream(config(made, PairsConfig), tokenizer, seed=0)
    seen = []
    for i in range(len(pairs.index)):
        file, line = pairs.where(i)
        row = json.loads(Path(file).read_text().splitlines()[line - 1])
        cut = expected[row["audio_filepath"].removesuffix(".flac")]
        np.testing.assert_array_equal(pairs._audio.read(i), cut.load_audio()[0])
        assert row["text"] == " ".join(s.text for s in sorted(cut.supervisions, key=lambda s: s.start))
        assert row["lang"] == "xx"
        seen.append(cut.id)
    assert sorted(seen) == sorted(expected)


def test_a_resume_at_a_url_gives_the_batches_of_an_unbroken_run_here(shar, bucket, tmp_path):
    """Exact resume: a batch is found by its number alone, in an object store as on a disk."""
    here = SpeechStream(config(shar_manifests(str(shar), tmp_path / "here")), seed=3)
    unbroken = [here.batch(step) for step in range(6)]
    made = shar_manifests(bucket, tmp_path / "there")
    assert made["tars"] == "memory:///bucket/shar/recording._OP_000000..000002_CL_.tar"
    for step in (5, 2, 3):  # three starts at three steps
        batch = SpeechStream(config(made), seed=3).batch(step)
        assert torch.equal(batch.ids, unbroken[step].ids)
        assert torch.equal(batch.audio, unbroken[step].audio)
    assert len({tuple(batch.ids.tolist()) for batch in unbroken}) > 3


def test_another_content_at_the_url_gives_another_index(shar, bucket, tmp_path, caplog):
    made = shar_manifests(bucket, tmp_path)
    SpeechStream(config(made), seed=0)
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/shar/recording.000001.tar", store.cat_file("/bucket/shar/recording.000001.tar") + b"\0")
    SpeechStream(config(made), seed=0)
    assert "does not match its sources any more" in caplog.text


class Flaky(MemoryFileSystem):
    """Fails ``failures`` times where a stretch of a file is asked for."""

    protocol = "flaky"
    failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise ConnectionResetError("by the store")
        return super().cat_file(path, start, end, **kwargs)


def test_a_store_that_fails_is_asked_again_and_is_never_a_bad_row(bucket, tmp_path, monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    made = shar_manifests(bucket, tmp_path)
    made["tars"] = made["tars"].replace("memory:///", "flaky://")
    rows = BadRows(tmp_path / "bad_rows.jsonl")
    stream = SpeechStream(config(made), seed=0, bad_rows=rows)
    expected = SpeechStream(config(shar_manifests(bucket, tmp_path / "sound")), seed=0).batch(0)
    Flaky.failures = remote.TRIES - 1
    assert torch.equal(stream.batch(0).audio, expected.audio)
    assert pauses == [1, 2, 4, 8, 16]
    Flaky.failures = 1000
    with pytest.raises(RemoteError, match=r"flaky://.*tar: no answer after 6 tries \(ConnectionResetError: by the"):
        stream.batch(0)
    assert rows.count() == 0


def test_what_is_missing_is_said(shar, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is no lhotse Shar with audio: 0 files cuts"):
        find_shards(str(tmp_path / "nowhere"))
    (tmp_path / "cuts.000000.jsonl.gz").write_bytes((shar / "cuts.000000.jsonl.gz").read_bytes())
    with pytest.raises(DataError, match=r"1 files cuts\.NUMBER\.jsonl\.gz and 0 files recording\.NUMBER\.tar"):
        find_shards(str(tmp_path))
    (tmp_path / "recording.000000.tar").write_bytes((shar / "recording.000000.tar").read_bytes())
    (tmp_path / "cuts.000000.jsonl").write_text('{"duration": 1.0}\n')
    (tmp_path / "cuts.000000.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"cuts\.000000\.jsonl:1: not a cut of lhotse"):
        shar_manifests(str(tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot read s4://bucket/a\.tar: Protocol not known: s4"):
        SpeechStream(SpeechConfig([str(tmp_path / "cuts.000000.jsonl")], 9, ["s4://bucket/a.tar"]), seed=0)
    with pytest.raises(DataError, match=r"s3://bucket/m\.json: only the tar files"):
        SpeechStream(SpeechConfig(["s3://bucket/m.json"], 9), seed=0)


def test_names_of_many_files():
    assert pattern("x/cuts", [""], ".tar") == "x/cuts.tar"
    assert pattern("x/cuts", [".3", ".5"], ".tar") == "[x/cuts.3.tar,x/cuts.5.tar]"


def test_the_script_says_what_to_train_on(shar, tmp_path):
    command = [sys.executable, "scripts/shard_data.py", "shar", str(shar), "--out", str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    values = dict(line.strip().split("=", 1) for line in said.splitlines() if "data.train_ds.speech" in line)
    manifests, tars = (values[f"data.train_ds.speech.{key}"] for key in ("manifest_filepath", "tarred_audio_filepaths"))
    assert len(SpeechStream(SpeechConfig([manifests], 900, [tars]), seed=0).index) == CUTS - 1
