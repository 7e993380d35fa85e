"""The learning experiments: trained for a few steps on a small oracle language, judged, and not trained twice."""

import json
import sys

import learning
import pytest

from nemo_slam.data.corpora import prepare


def test_thresholds():
    every = learning.Threshold("x", 0.5)
    assert every.met([0.5, 0.9])
    assert not every.met([0.4, 0.9])
    assert learning.Threshold("x", 0.5, scope="best").met([0.4, 0.9])
    assert not learning.Threshold("x", 0.5, at_least=False).met([0.4, 0.9])


def test_an_untrained_model_misses_them_and_a_second_call_trains_no_more(tmp_path, monkeypatch, capfd):
    root = prepare("oracle_language", tmp_path / "oracle_language", sequences=300)
    out = tmp_path / "result.json"
    arguments = ["oracle", "--seeds", "1", "--steps", "2", f"--exp-dir={tmp_path / 'runs'}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["learning.py", *arguments, f"data.root={root}", "data.num_workers=0"])
    assert learning.main() == 1
    assert "scripts/speech_pretrain.py" in capfd.readouterr().out
    first = json.loads(out.read_text())
    assert 0 <= first["seeds"][0]["text_given_speech"] < 0.3
    assert any(not check["met"] for check in first["checks"])
    assert learning.main() == 1
    assert "scripts/speech_pretrain.py" not in capfd.readouterr().out
    second = json.loads(out.read_text())
    assert second["checks"] == first["checks"]


def test_figures_are_not_those_of_an_earlier_validation(tmp_path):
    """A run that was killed in its last validation has its .nemo after the next start, and no row of it."""
    speech = "val_masked_speech/code"
    columns = [f"{speech}_information_gain", f"{speech}_perplexity", f"{speech}_accuracy", f"{speech}_top_share"]
    columns += ["val_masked_text/tokens_by_unigram", "val_masked_text/tokens"]
    head = ",".join(["step", "loss", "masked_speech/code_information_gain", "val_loss", *columns])
    rows = ["300,,,9,0.1,8,0.5,0.25,4,3", "600,8,0.5,,,,,,,", "600,,,7,0.2,16,0.75,0.25,4,2"]
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("\n".join([head, *rows]) + "\n")
    config = "trainer: {max_steps: %d, val_check_interval: %d, accumulate_grad_batches: %d}\n"
    # Of 650 steps; of 650 in two micro-batches each, of which 600 make an interval.
    for settings in ((650, 300, 1), (650, 600, 2)):
        (tmp_path / "config.yaml").write_text(config % settings)
        found = learning.stage1_figures(tmp_path)
        assert (found["held_out_information_gain"], found["text_gain"]) == (0.2, 2)
    metrics.write_text("\n".join([head, *rows[:2]]) + "\n")
    with pytest.raises(SystemExit, match=r"metrics.csv has no validation of step 600, .* Delete the folder"):
        learning.stage1_figures(tmp_path)
