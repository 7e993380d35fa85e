"""The learning experiments: trained for a few steps on a small oracle language, judged, and not trained twice."""

import json
import sys

import learning

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
