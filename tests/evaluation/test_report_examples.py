"""The report's examples come from the run's weights and validation data: held against the model's own figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_slam.evaluation import probes
from nemo_slam.evaluation.report import examples as report_examples
from nemo_slam.evaluation.report import make
from nemo_slam.evaluation.report.runs import read_run


@pytest.fixture
def folder(pretrain_config) -> Path:
    from nemo_slam.training.pretrain import pretrain

    return pretrain(pretrain_config(2, "trainer.max_steps=5"))


@torch.no_grad()
def test_examples_of_a_run(folder):
    run = read_run(folder)
    found = report_examples.read_examples(run)
    assert found.missing == {}
    assert found.trained_on_pairs
    assert found.source == "slam_stage2.nemo"
    model = report_examples.restore(run, report_examples.weights_of(run)[0])
    batches = report_examples.validation_batches(run, model)

    # Codes: the histogram that the objective itself hands out.
    results = [model.losses(batch)[1] for batch in batches]
    counts = sum(h.counts for result in results for h in result.histograms if h.name == "masked_speech/code")
    np.testing.assert_array_equal(found.code_counts, counts.numpy())
    with (folder / "metrics.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["val_loss"]][-1]
    assert report_examples.summary(found)["perplexity"] == pytest.approx(
        float(last["val_masked_speech/code_perplexity"]), rel=1e-5
    )

    # The spectrogram: an utterance of the batch, its features and masked share as the model has them.
    shown = found.spectrogram
    mels, frames = model.features(batches[0])
    of_speech = [mels[i, :, : frames[i]].numpy() for i in range(len(batches[0].speech))]
    matching = [mel for mel in of_speech if mel.shape == shown.mel.shape and np.allclose(mel, shown.mel)]
    assert len(matching) == 1
    assert len(shown.mask) == -(-shown.mel.shape[1] // 4)
    assert ((shown.codes >= 0) == shown.mask).all()
    assert ((shown.predicted >= 0) == shown.mask).all()
    assert all(end - start >= 10 for start, end in shown.spans)
    assert sum(end - start for start, end in shown.spans) == shown.mask.sum()

    # Retrieval: ranks as the probe has them.
    size = len(found.retrieval.best)
    assert size == len(batches[0].pairs) > 1
    metrics = {m.name: m for m in probes.retrieval(probes.EncodedPairs(model, batches[0].pairs), batches[0].pairs)}
    assert found.retrieval.correct.sum() == float(metrics["probe/retrieval_at_1"].total)
    assert ((found.retrieval.probability > 0) & (found.retrieval.probability < 1)).all()

    for pair in found.similarity:
        assert len(pair.tokens) == len(pair.cosine)
        assert np.abs(pair.cosine).max() <= 1 + 1e-5
    page = folder / "report.html"
    make.make([folder], page)
    assert "Not shown: left out" not in page.read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["commit"] in page.read_text()


@torch.no_grad()
def test_codes_predicted_right_are_the_metric(model_config, make_batch):
    """On a batch of one utterance the share of the strip that agrees is the objective's code accuracy."""
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    torch.manual_seed(0)
    model = SLAMPretrainingModel(model_config()).eval()
    batch = make_batch(speech=(3.0,))
    _, found = report_examples.masked_speech(model, [batch], "masked_speech")
    metrics = {m.name: m for m in model.losses(batch)[1].metrics}
    accuracy, rate = metrics["masked_speech/code_accuracy"], metrics["masked_speech/mask_rate"]
    assert found.mask.any()
    assert found.right == pytest.approx(float(accuracy.total / accuracy.count))
    assert found.mask.mean() == pytest.approx(float(rate.total / rate.count))


@torch.no_grad()
def test_similarity_of_tokens_and_frames(model_config, make_batch):
    """NumPy cosines about each side's mean, from sequences encoded one by one."""
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    torch.manual_seed(0)
    model = SLAMPretrainingModel(model_config()).eval()
    pairs = make_batch(pairs=((0.8, 9, 7), (1.4, 12, 10))).pairs
    pairs.tokens %= 32  # the tokenizer's pieces
    encoded = probes.EncodedPairs(model, pairs)
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i, tokens in enumerate(pairs.tokens.split(pairs.lengths.tolist())):
        hidden, packed = encoded.encode([i], tokens, pairs.lengths.numpy()[i : i + 1], cls=True)
        for side, segment in zip(sides, (1, 2), strict=True):
            side.append(hidden[torch.as_tensor(packed.rows_of("probe", segment))].double().numpy())
    found = {len(pair.tokens): pair.cosine for pair in report_examples.similarities(model, pairs)}
    for i, size in enumerate(pairs.lengths.tolist()):
        speech, text = (side[i] - np.concatenate(side).mean(0) for side in sides)
        cosine = text @ speech.T / np.linalg.norm(text, axis=1)[:, None] / np.linalg.norm(speech, axis=1)
        np.testing.assert_allclose(found[size], cosine, atol=1e-4)


def test_reasons(folder, monkeypatch, tmp_path):
    run = read_run(folder)
    with monkeypatch.context() as patch:  # a run on a GPU, looked at on another machine
        patch.setitem(run.config["model"]["conformer"], "kernels", "triton")
        assert report_examples.read_examples(run).missing == {}
    monkeypatch.setitem(run.config["model"]["tokenizer"], "model_path", "gone/tokenizer.model")
    assert "gone/tokenizer.model is not here" in report_examples.read_examples(run).missing["codes"]

    def too_large(run, weights):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:  # a report of a run that goes on and fills the GPU
        patch.setattr(report_examples, "restore", too_large)
        assert "the GPU has no room" in report_examples.read_examples(run).missing["codes"]
    monkeypatch.undo()
    for _ in ("the .nemo", "a checkpoint"):
        weights = report_examples.weights_of(run)[0]
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        assert "cannot be read" in report_examples.read_examples(run).missing["codes"]
        weights.unlink()
    for path in [*folder.glob("*.nemo"), *folder.glob("checkpoints/*")]:
        path.unlink()
    assert "no checkpoint" in report_examples.read_examples(run).missing["spectrogram"]
    run.config["model"].pop("objectives")
    assert "fine-tuned" in report_examples.read_examples(run).missing["retrieval"]
