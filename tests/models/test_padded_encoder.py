"""The padded path equals the packed one, and its ONNX equals both."""

import numpy as np
import pytest
import torch

from nemo_slam.models.encoder import SLAMEncoder
from nemo_slam.models.padded import PaddedEncoder

NODE = {
    "conformer": {"d_model": 32, "d_ff": 64, "n_heads": 2, "conv_norm_groups": 4, "dropout": 0.0},
    "speech_encoder": {"num_layers": 1, "conv_channels": 4},
    "multimodal_encoder": {"num_layers": 1},
}


def noisy(encoder):
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


@pytest.mark.parametrize("lengths", [[37, 101, 4, 64, 1], [50], [8, 8], [9, 0, 30]])
@pytest.mark.parametrize("groups", [4, 32])
def test_padded_equals_packed_whatever_the_padding_holds(lengths, groups):
    torch.manual_seed(0)
    encoder = noisy(SLAMEncoder(**{**NODE, "conformer": {**NODE["conformer"], "conv_norm_groups": groups}}).double())
    features = torch.randn(len(lengths), 80, max(lengths) + 20, dtype=torch.float64) * 3
    for row, length in zip(features[::2], lengths[::2], strict=True):
        row[:, length:] = torch.nan  # as a client's buffer that was never written
    expected, expected_lengths = encoder(audio_signal=features, length=torch.tensor(lengths))
    found, found_lengths = PaddedEncoder(encoder)(features, torch.tensor(lengths))
    assert found_lengths.tolist() == expected_lengths.tolist()
    width = expected.shape[2]
    torch.testing.assert_close(found[:, :, :width], expected, rtol=0, atol=1e-9)
    assert not found[:, :, width:].any()


@pytest.mark.slow
def test_onnx_equals_pytorch_on_ragged_batches(model_config, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    from nemo.collections.asr.models import EncDecCTCModelBPE

    from nemo_slam.data.tokenizer import train_on_lines
    from nemo_slam.export import export_nemo
    from nemo_slam.export_onnx import export_onnx, load_encoder
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    torch.manual_seed(0)
    noisy(SLAMPretrainingModel(model_config())).save_to(str(tmp_path / "slam.nemo"))
    spm = train_on_lines(["one two three", "press star two"] * 20, tmp_path / "spm", 24, allow_smaller=True)
    export_nemo(tmp_path / "slam.nemo", "ctc", spm, tmp_path / "ctc.nemo")
    stock = EncDecCTCModelBPE.restore_from(str(tmp_path / "ctc.nemo"), map_location="cpu").eval()
    encoder = load_encoder(tmp_path / "slam.nemo").eval()

    for part, source in (("encoder", "slam.nemo"), ("ctc", "ctc.nemo")):
        export_onnx(tmp_path / source, part, tmp_path / f"{part}.onnx")
        session = onnxruntime.InferenceSession(tmp_path / f"{part}.onnx")
        for lengths, width in (([37, 101, 4, 64, 1], 120), ([50], 50), ([7, 9, 3], 9)):
            features, length = torch.randn(len(lengths), 80, width), torch.tensor(lengths)
            found, frames = session.run(None, {"audio_signal": features.numpy(), "length": length.numpy()})
            with torch.no_grad():
                if part == "encoder":
                    expected, expected_frames = encoder(audio_signal=features, length=length)
                    found = found[:, :, : expected.shape[2]]
                else:
                    expected, expected_frames, _ = stock(processed_signal=features, processed_signal_length=length)
                    found = found[:, : expected.shape[1]]
            assert frames.tolist() == expected_frames.tolist()
            np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
