"""SLAMEncoder: the contract of a NeMo encoder, over unsorted ragged batches."""

import numpy as np
import pytest
import torch

from nemo_slam.models.encoder import SLAMEncoder
from nemo_slam.packing import SequenceLayout

NODE = {
    "conformer": {"d_model": 32, "d_ff": 64, "n_heads": 2, "conv_norm_groups": 4, "dropout": 0.0},
    "speech_encoder": {"num_layers": 1, "conv_channels": 4},
    "multimodal_encoder": {"num_layers": 2},
    "pad_multiple": 8,
}
LENGTHS = [37, 101, 4, 64, 1]


@pytest.fixture(scope="module")
def encoder() -> SLAMEncoder:
    torch.manual_seed(0)
    encoder = SLAMEncoder(**NODE).double()
    with torch.no_grad():
        for parameter in encoder.parameters():  # the modality table starts at zero, norms at one: hide nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def features(lengths=LENGTHS, width=None, padding=0.0) -> torch.Tensor:
    """The same noise for an utterance whatever stands beside it; ``padding`` fills what lies beyond its length."""
    batch = torch.full((len(lengths), 80, width or max(lengths)), padding, dtype=torch.float64)
    for row, length in zip(batch, lengths, strict=True):
        generator = torch.Generator().manual_seed(length)
        row[:, :length] = torch.randn(80, length, dtype=torch.float64, generator=generator)
    return batch


def sinusoids(rows: int, width: int) -> np.ndarray:
    """Written from the formula of Vaswani et al., sines then cosines."""
    angles = np.arange(rows)[:, None] / 10000.0 ** (np.arange(width // 2) / (width // 2 - 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def test_output_is_the_layers_applied_to_each_utterance_alone(encoder):
    out, lengths = encoder(audio_signal=features(), length=torch.tensor(LENGTHS))
    assert lengths.tolist() == [10, 26, 1, 16, 1]
    assert out.shape == (5, 32, 26)
    for i, length in enumerate(LENGTHS):
        layout = SequenceLayout.build(np.array([lengths[i]]))
        rows = encoder.speech_encoder.subsample(features([length]), np.array([length]))
        rows = torch.cat([rows, rows.new_zeros(layout.num_rows - len(rows), 32)])
        rows = encoder.speech_encoder.proj(encoder.speech_encoder.layers(rows, layout))
        rows = rows + torch.from_numpy(sinusoids(len(rows), 32)) + encoder.multimodal_encoder.modality[0]
        expected = encoder.multimodal_encoder.layers(rows, layout)[: lengths[i]]
        # float32 angles of the positions are all that is not double here
        torch.testing.assert_close(out[i, :, : lengths[i]].T, expected, rtol=0, atol=1e-5)


def test_alone_and_in_any_batch_are_equal_and_padding_is_zero(encoder):
    together, lengths = encoder(audio_signal=features(width=160, padding=1e3), length=torch.tensor(LENGTHS))
    for i, length in enumerate(LENGTHS):
        alone, alone_length = encoder(audio_signal=features([length]), length=torch.tensor([length]))
        assert alone_length.tolist() == [lengths[i]]
        torch.testing.assert_close(together[i, :, : lengths[i]], alone[0], rtol=0, atol=1e-9)
        assert not together[i, :, lengths[i] :].any()


def test_every_parameter_has_a_gradient_and_unfreezing_adds_none():
    encoder = SLAMEncoder(**NODE)
    encoder.freeze()
    encoder.unfreeze()  # what NeMo's transcribe() and freeze_updates do
    out, _ = encoder(audio_signal=features().float(), length=torch.tensor(LENGTHS))
    out.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert "multimodal_encoder.cls" in encoder.state_dict()


def test_no_utterance_is_no_error(encoder):
    out, lengths = encoder(audio_signal=features([], width=9), length=torch.tensor([], dtype=torch.int64))
    assert out.shape == (0, 32, 0)
    assert lengths.shape == (0,)


def test_what_would_keep_the_lengths_of_an_example_is_refused(encoder, tmp_path):
    """By hand, and by the doors of NeMo's models: CTC exports itself with its encoder, a transducer the encoder."""
    example = (features(), torch.tensor(LENGTHS))
    with pytest.raises(NotImplementedError, match=r"a trace would keep .*--to onnx-encoder"):
        torch.jit.trace(lambda audio, length: encoder(audio_signal=audio, length=length)[0], example)
    for name, options in (("x.onnx", {}), ("x.ts", {}), ("x.onnx", {"input_example": example})):
        with pytest.raises(NotImplementedError, match="export_nemo"):
            SLAMEncoder(**NODE).export(str(tmp_path / name), **options)
    assert not list(tmp_path.iterdir())


def test_a_misspelt_key_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"encoder\.conformer: unknown key 'd_modell'; did you mean 'd_model'"):
        SLAMEncoder(**{**NODE, "conformer": {"d_modell": 32}})
