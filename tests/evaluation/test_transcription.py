"""Finding and cutting audio; the model's side is tested with a real one in tests/finetuning/test_finetune.py."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nemo_slam.evaluation import transcription
from nemo_slam.evaluation.transcription import cut, find_items, transcribe, write_line


class Recorder:
    """Stands for a NeMo model: says how many seconds it heard, and notes the batches."""

    def __init__(self):
        self.batches = []

    def transcribe_generator(self, audio, config):
        assert config.pad_min_duration == 0.0
        self.batches.append([len(a) / 16000 for a in audio])
        yield [f"{len(a) / 16000:g}" for a in audio]


def wav(path, seconds, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(int(seconds * 100))
    soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * rate)), rate)
    return path


def test_files_folders_and_manifests_in_order_with_errors_beside(tmp_path):
    wav(tmp_path / "folder" / "b.wav", 0.5)
    wav(tmp_path / "folder" / "deep" / "a.flac", 0.75)
    (tmp_path / "folder" / "notes.txt").write_text("no audio")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.wav").write_text("no audio")
    rows = [
        {"audio_filepath": "folder/b.wav", "duration": 0.25, "offset": 0.25, "text": "hola", "lang": "es", "other": 1},
        {"duration": 1.0},
        {"audio_filepath": "missing.wav", "duration": 1.0},
        {"audio_filepath": "~no-such-user/x.wav", "duration": 1.0},
    ]
    manifest = tmp_path / "m.json"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = [tmp_path / "bad.wav", tmp_path / "folder", tmp_path / "empty", manifest]
    items = list(transcribe(Recorder(), find_items(inputs), batch_size=2))
    assert [item.row.get("pred_text") for item in items] == [None, "0.5", "0.75", None, "0.25", *[None] * 3]
    assert items[4].row == {
        "audio_filepath": str(tmp_path / "folder" / "b.wav"),
        "duration": 0.25,
        "text": "hola",
        "lang": "es",
        "other": 1,
        "corpus": "m",
        "offset": 0.25,
        "pred_text": "0.25",
    }
    assert "bad.wav: not readable as audio" in items[0].problem
    assert "empty: no audio" in items[3].problem
    assert "m.json:2: missing key" in items[5].problem
    assert "missing.wav" in items[6].problem
    assert "~no-such-user/x.wav: cannot be opened" in items[7].problem


def test_batches_hold_utterances_of_similar_length(tmp_path):
    lengths = [0.5, 2.0, 0.75, 1.5]
    model = Recorder()
    items = list(transcribe(model, find_items(wav(tmp_path / f"{s}.wav", s) for s in lengths), batch_size=2))
    assert model.batches == [[0.5, 0.75], [1.5, 2.0]]
    assert [item.row["pred_text"] for item in items] == ["0.5", "2", "0.75", "1.5"]


def test_other_rates_are_resampled(tmp_path):
    (item,) = transcribe(Recorder(), find_items([wav(tmp_path / "x.wav", 1.0, rate=8000)]))
    assert item.row["pred_text"] == "1"


def test_long_audio_is_cut_where_it_is_quiet_and_nothing_is_lost():
    audio = np.random.default_rng(0).standard_normal(16000 * 9).astype(np.float32)
    for second in (1.8, 3.6):  # within the last quarter of 2 s, then of the piece that begins at 1.8 s
        audio[int(second * 16000) : int((second + 0.05) * 16000)] = 0
    pieces = cut(audio, 2.0)
    np.testing.assert_array_equal(np.concatenate(pieces), audio)
    assert max(map(len, pieces)) <= 32000
    ends = np.cumsum([len(p) for p in pieces]) / 16000
    assert 1.8 <= ends[0] <= 1.85
    assert 3.6 <= ends[1] <= 3.65
    assert [len(p) for p in cut(audio, 9.0)] == [len(audio)]


def test_texts_of_chunks_are_joined(tmp_path):
    (item,) = transcribe(Recorder(), find_items([wav(tmp_path / "x.wav", 5.0)]), chunk_seconds=2.0)
    assert sum(map(float, item.row["pred_text"].split())) == pytest.approx(5.0)
    assert item.row["duration"] == 5.0


@pytest.mark.parametrize("samples", [1, 165, 319])
def test_what_is_too_short_for_the_features_is_not_heard(tmp_path, samples):
    """NeMo's normalisation of one frame is an error where there is a GPU: of a file, and of the rest of a long one."""
    long, short = tmp_path / "long.wav", tmp_path / "short.wav"
    audio = np.full(2 * 16000 + samples, 0.1, np.float32)
    audio[2 * 16000 - 320 :] = 0.0  # the quietest place, where a chunk of 2 s ends
    soundfile.write(long, audio, 16000)
    soundfile.write(short, audio[:samples], 16000)
    model = Recorder()
    items = list(transcribe(model, find_items([short, long]), chunk_seconds=2.0))
    assert [item.problem for item in items] == [None, None]
    assert items[0].row["pred_text"] == ""
    assert all(seconds >= 0.02 for batch in model.batches for seconds in batch)
    assert 1.9 < float(items[1].row["pred_text"].split()[0]) < 2.0


def test_long_recordings_are_not_held_together(tmp_path, monkeypatch):
    """At most so many seconds of audio are in memory, and transcripts come as soon as theirs is done."""
    monkeypatch.setattr(transcription, "_WINDOW_SECONDS", 3.0)
    loaded = []
    load = transcription.load_audio
    monkeypatch.setattr(transcription, "load_audio", lambda path, **where: loaded.append(path) or load(path, **where))
    items = transcribe(Recorder(), find_items(wav(tmp_path / f"{number}.wav", 2.0) for number in range(5)))
    assert next(items).row["pred_text"] == "2"
    assert len(loaded) == 2
    assert [item.row["pred_text"] for item in items] == ["2"] * 4


def test_half_a_surrogate_pair_in_a_row_is_written_as_it_was(tmp_path):
    """JSON may hold one, UTF-8 may not."""
    row = {"audio_filepath": str(wav(tmp_path / "x.wav", 0.5)), "text": "caf\udce9"}
    (tmp_path / "m.json").write_text(json.dumps(row) + "\n")
    (item,) = transcribe(Recorder(), find_items([tmp_path / "m.json"]))
    assert json.loads(write_line(item).encode("utf-8"))["text"] == row["text"]


def test_the_output_may_not_be_an_input(tmp_path, monkeypatch, capsys):
    """It would be emptied before it is read."""
    script = Path(__file__).parents[2] / "scripts" / "transcribe.py"
    parse = runpy.run_path(str(script))["parse_arguments"]
    manifest = tmp_path / "m.json"
    manifest.write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    assert parse(["m.nemo", str(manifest), "--out", "other.json"]).out == Path("other.json")
    with pytest.raises(SystemExit):
        parse(["m.nemo", str(manifest), "--out", "m.json"])
    assert "is an input too" in capsys.readouterr().err
    assert manifest.read_text() == "{}\n"
