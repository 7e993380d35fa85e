"""export_nemo: a pre-trained encoder as a stock model."""

import pytest
import torch
from nemo.collections.asr.models import ASRModel, EncDecCTCModelBPE

from nemo_slam.data.tokenizer import train_on_lines
from nemo_slam.export import export_nemo
from nemo_slam.models.pretraining import SLAMPretrainingModel
from nemo_slam.training.initialise import read_weights


@pytest.fixture
def source(model_config, tmp_path):
    torch.manual_seed(2)
    path = tmp_path / "slam.nemo"
    SLAMPretrainingModel(model_config()).save_to(str(path))
    return path


@pytest.fixture
def tokenizer(tmp_path_factory):
    lines = ["one two three", "press star two"] * 20
    return train_on_lines(lines, tmp_path_factory.mktemp("spm"), 24, allow_smaller=True)


def test_stock_model_with_the_pretrained_encoder(source, tokenizer, tmp_path):
    out = tmp_path / "deep" / "ctc.nemo"
    report = export_nemo(source, "ctc", tokenizer, out)
    assert report.share == 1.0
    before, after = read_weights(source), read_weights(out)
    encoder = [name for name in before if name.startswith(("speech_encoder", "multimodal_encoder"))]
    assert {f"encoder.{name}" for name in encoder} == {name for name in after if name.startswith("encoder.")}
    assert all(torch.equal(before[name], after[f"encoder.{name}"]) for name in encoder)
    assert not [name for name in after if "_extra_state" in name]

    model = ASRModel.restore_from(str(out), map_location="cpu")
    assert type(model) is EncDecCTCModelBPE
    assert model.decoder.num_classes_with_blank == model.tokenizer.vocab_size + 1
    assert len(model.transcribe([torch.zeros(16000)], verbose=False)) == 1


def test_what_cannot_be_exported_is_named(source, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--tokenizer: .*none holds no tokenizer\.model"):
        export_nemo(source, "ctc", tmp_path / "none", tmp_path / "x.nemo")
    with pytest.raises(ValueError, match=r"must end in \.nemo"):
        export_nemo(source, "ctc", tokenizer, tmp_path / "x.tar")
    with pytest.raises(ValueError, match=r"'tts' is not one of ctc"):
        export_nemo(source, "tts", tokenizer, tmp_path / "x.nemo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slam.nemo"]


def test_only_ctc_models_become_ctc_in_onnx(source, tmp_path):
    from nemo_slam.export_onnx import export_onnx

    with pytest.raises(ValueError, match=r"SLAMPretrainingModel, which is no CTC model"):
        export_onnx(source, "ctc", tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"must end in \.onnx"):
        export_onnx(source, "encoder", tmp_path / "x.nemo")
    with pytest.raises(ValueError, match="'decoder' is not one of encoder, ctc"):
        export_onnx(source, "decoder", tmp_path / "x.onnx")
