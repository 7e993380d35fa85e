"""Tables of scores by group, and the evaluate script's contract."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from nemo_slam.evaluation.scoring import Options, compare, read_transcripts, score

ROWS = [
    {"audio_filepath": "a.wav", "lang": "es", "text": "uno dos", "pred_text": "uno dos"},
    {"audio_filepath": "b.wav", "lang": "es", "text": "tres", "pred_text": "dos"},
    {"audio_filepath": "c.wav", "lang": "en", "text": "one two three", "pred_text": "one two three"},
]
WER = Options(("wer",), resamples=50)


@pytest.fixture
def evaluate():
    """scripts/evaluate.py as a module."""
    path = Path(__file__).parents[2] / "scripts" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return module.main()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_by_language():
    groups = score(ROWS, WER)["groups"]
    assert {name: group["wer"]["value"] for name, group in groups.items()} == {
        "all": pytest.approx(100 / 6),
        "lang=es": pytest.approx(100 / 3),
        "lang=en": 0.0,
    }


def test_scores_by_corpus_too_where_there_are_several():
    rows = [{**row, "corpus": "one" if number < 2 else "two"} for number, row in enumerate(ROWS)]
    assert list(score(rows, WER)["groups"]) == ["all", "lang=es", "lang=en", "corpus=one", "corpus=two"]
    assert list(score(rows[:2], WER)["groups"]) == ["all"]


def test_texts_are_paired_by_all_their_keys():
    rows = [{"text": "good film", "label": "1", "pred_text": "1"}, {"text": "bad film", "label": "0", "pred_text": "1"}]
    better = [{**row, "pred_text": row["label"]} for row in reversed(rows)]
    options = Options(("accuracy",), reference="label", normalisation="none", resamples=50)
    assert compare(rows, better, options)["accuracy"]["value"] == 50.0


def test_difference_is_taken_on_shared_utterances():
    better = [{**row, "pred_text": row["text"]} for row in ROWS[:2]]
    difference = compare(ROWS, better, WER)["wer"]
    assert difference["value"] == pytest.approx(-100 / 3)
    assert difference["utterances"] == 2
    with pytest.raises(ValueError, match="no utterance in common"):
        compare(ROWS[:1], better[1:], WER)


def test_table_and_json_from_the_command_line(evaluate, monkeypatch, tmp_path, capsys):
    file = write(tmp_path / "t.jsonl", [*ROWS, {"text": "", "pred_text": "si", "lang": "en"}])
    out = tmp_path / "scores" / "s.json"
    assert run(evaluate, monkeypatch, file, "--resamples", 20, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "1 empty reference(s)" in printed
    assert "case folded" in printed
    assert json.loads(out.read_text())["groups"]["all"]["wer"]["value"] == pytest.approx(100 * 2 / 6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"pred_text": "x", "audio_filepath": "a.wav"}], r"line 1 \(a.wav\): no string 'text'.*--reference"),
        ([{"text": "x"}], r"t.jsonl:1: no string 'pred_text'"),
        ([{"pred_text": "x", "text": None}], r"line 1 .*no string 'text'"),
        ([], r"nothing to score in .*t.jsonl"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(evaluate, monkeypatch, tmp_path, capsys, rows, message):
    assert run(evaluate, monkeypatch, write(tmp_path / "t.jsonl", rows)) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


def test_labels_may_be_whole_numbers_as_in_training(evaluate, monkeypatch, tmp_path, capsys):
    rows = [{"text": "good film", "label": 1, "pred_text": "1"}, {"text": "bad film", "label": 0, "pred_text": "1"}]
    out = tmp_path / "s.json"
    options = ("--reference", "label", "--metrics", "accuracy", "--resamples", 20, "--out", out)
    assert run(evaluate, monkeypatch, write(tmp_path / "t.jsonl", rows), *options) == 0
    assert json.loads(out.read_text())["groups"]["all"]["accuracy"]["value"] == 50.0


def test_what_has_no_transcript_is_counted_and_the_status_says_so(evaluate, monkeypatch, tmp_path, capsys):
    from nemo_slam.evaluation import transcription
    from nemo_slam.evaluation.transcription import Item

    items = [Item("a", Path("a.wav"), row=ROWS[0]), Item("b", Path("b.wav"), problem="b.wav: cannot be opened")]
    monkeypatch.setattr(transcription, "restore", lambda path: None)
    monkeypatch.setattr(transcription, "answers", lambda model, inputs, batch_size: items)
    assert run(evaluate, monkeypatch, "m.nemo", "m.json", "--resamples", 20) == 1
    captured = capsys.readouterr()
    assert "1 of 2 have no transcript" in captured.err
    assert "all  1" in captured.out
    monkeypatch.setattr(transcription, "answers", lambda model, inputs, batch_size: items[1:])
    assert run(evaluate, monkeypatch, "m.nemo", "m.json") == 2


def test_a_missing_reference_is_found_before_anything_is_transcribed(evaluate, monkeypatch, tmp_path, capsys):
    from nemo_slam.evaluation import transcription

    rows = [{"audio_filepath": "a.wav", "text": "one"}, {"audio_filepath": "b.wav", "transcript": "two"}]
    monkeypatch.setattr(transcription, "restore", lambda path: None)
    monkeypatch.setattr(transcription, "answers", lambda *arguments: pytest.fail("it transcribed"))
    assert run(evaluate, monkeypatch, "m.nemo", write(tmp_path / "m.json", rows)) == 2
    assert "m.json:2: no string 'text' to score against; it has corpus, transcript (" in capsys.readouterr().err
    manifest = write(tmp_path / "m.json", rows[:1])
    other = write(tmp_path / "t.jsonl", [{"pred_text": "x", "transcript": "x"}])
    for against, said in ((other, "t.jsonl, line 1 (no audio_filepath): no"), ("none.jsonl", "none.jsonl")):
        assert run(evaluate, monkeypatch, "m.nemo", manifest, "--against", against) == 2
        assert said in capsys.readouterr().err


def test_a_broken_line_is_named(tmp_path):
    for line, problem in ((b'{"pred_text"', "malformed JSON"), (b'{"pred_text": "caf\xe9"}', "not UTF-8")):
        (tmp_path / "t.jsonl").write_bytes(b'{"pred_text": "a"}\n\n' + line + b"\n")
        with pytest.raises(ValueError, match=rf"t\.jsonl:3: {problem}"):
            read_transcripts(tmp_path / "t.jsonl")
