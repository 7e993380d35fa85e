"""Probes of saved models, and answers of models that read text, by their doors."""

import json

import numpy as np
import pytest
import soundfile
import torch

from nemo_slam.evaluation.probing import probe_model


@pytest.fixture
def manifest(tmp_path):
    rows = []
    for number in range(5):
        noise = np.random.default_rng(number).normal(0, 0.1, 9600 + 3200 * number)
        soundfile.write(tmp_path / f"{number}.wav", noise, 16000, subtype="FLOAT")
        text = " ".join([*["one", "two", "press", "star", "hold"][number:], "the"])
        rows.append({"audio_filepath": f"{number}.wav", "duration": len(noise) / 16000, "text": text, "lang": "en"})
    path = tmp_path / "pairs.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rank_by_numpy(model, encoder, manifest) -> float:
    """From the definition: exp of the entropy of the normalised singular values of the centred rows."""
    rows = []
    for line in manifest.read_text().splitlines():
        audio, _ = soundfile.read(manifest.parent / json.loads(line)["audio_filepath"], dtype="float32")
        with torch.no_grad():
            length = torch.tensor([len(audio)])
            mel, frames = model.preprocessor(input_signal=torch.from_numpy(audio)[None], length=length)
            rows.append(encoder(audio_signal=mel, length=frames)[0][0].T.double().numpy())
    rows = np.concatenate(rows)
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    share = values[values > 1e-12] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def test_effective_rank_of_a_pretrained_and_of_a_stock_model(model_config, manifest, tmp_path):
    from nemo.collections.asr.models import ASRModel

    from nemo_slam.data.tokenizer import train_on_lines
    from nemo_slam.export import export_nemo
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    torch.manual_seed(0)
    SLAMPretrainingModel(model_config()).save_to(str(tmp_path / "slam.nemo"))
    spm = train_on_lines(["one two three", "press star two"] * 20, tmp_path / "spm", 24, allow_smaller=True)
    export_nemo(tmp_path / "slam.nemo", "ctc", spm, tmp_path / "ctc.nemo")
    figures = probe_model(tmp_path / "slam.nemo", [manifest])
    model = ASRModel.restore_from(str(tmp_path / "ctc.nemo"), map_location="cpu").eval()
    expected = rank_by_numpy(model, model.encoder, manifest)
    assert 2 < expected < 32
    assert figures["effective_rank"] == pytest.approx(expected, rel=1e-3)
    assert probe_model(tmp_path / "ctc.nemo", [manifest]) == pytest.approx({"effective_rank": expected}, rel=1e-3)
    assert 0 <= figures["text_given_speech"] <= 1
    assert {"matching_choice", "retrieval_at_1", "retrieval_at_1_chance"} <= figures.keys()
    assert not list(manifest.parent.glob(".nemo_slam_index*"))


def test_texts_are_answered_in_order_with_problems_beside(tmp_path):
    from types import SimpleNamespace
    from typing import ClassVar

    from nemo_slam.data.manifest import RowError
    from nemo_slam.evaluation.text_answers import answer, find_texts

    class Echo:
        """Stands for a model of two texts; knows no "zz"."""

        cfg = SimpleNamespace(text_keys=["a", "b"])
        batches: ClassVar[list[int]] = []

        def encode_texts(self, rows):
            if any("zz" in text for row in rows for text in row):
                raise RowError("text is unknown to the tokenizer")

        def answer(self, rows):
            self.batches.append(len(rows))
            return ["+".join(row) for row in rows]

    rows = [{"a": "x", "b": "long text", "label": 3}, {"a": "y"}, {"a": "zz", "b": "w"}, {"a": "u", "b": " v "}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    (tmp_path / "t.txt").write_text("hello\n")
    found = list(
        answer(Echo(), find_texts([tmp_path / "t.jsonl", tmp_path / "t.txt", tmp_path / "none"], ["a", "b"]), 2)
    )
    assert [item.row.get("pred_text") for item in found] == ["x+long text", None, None, "u+v", None, None, None]
    assert found[0].row == {**rows[0], "corpus": "t", "pred_text": "x+long text"}
    assert "t.jsonl:2: missing key 'b'" in found[1].problem
    assert "t.jsonl:3: text is unknown to the tokenizer" in found[2].problem
    assert "t.jsonl:5: malformed JSON" in found[4].problem
    assert "reads JSON-lines with a, b" in found[5].problem
    assert "no such file" in found[6].problem
    (line,) = find_texts([tmp_path / "t.txt"], ["text"])
    assert line.row == {"corpus": "t", "text": "hello"}
