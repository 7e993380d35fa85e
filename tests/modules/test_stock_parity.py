"""Our encoder is NeMo's ConformerEncoder, utterance by utterance: same weights, same output, same gradients."""

import numpy as np
import pytest
import torch
from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling

from nemo_slam.modules.conformer import ConformerConfig
from nemo_slam.modules.speech_encoder import (
    PackedConvSubsampling,
    SpeechEncoder,
    SpeechEncoderConfig,
    subsampled_lengths,
)
from nemo_slam.packing import Segments, gather_rows, pack

EPS = 1e-3
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 37, 64, 101]


@pytest.fixture(scope="module")
def encoders():
    """(stock, ours) with the same weights, in float64."""
    torch.manual_seed(0)
    config = ConformerConfig(d_model=32, d_ff=64, n_heads=4, conv_norm_groups=8, conv_norm_eps=EPS, dropout=0.0)
    ours = SpeechEncoder(SpeechEncoderConfig(feat_in=80, conv_channels=6, num_layers=3), config).double()
    stock = ConformerEncoder(
        feat_in=80,
        n_layers=3,
        d_model=32,
        subsampling="striding",
        subsampling_factor=4,
        subsampling_conv_channels=6,
        ff_expansion_factor=2,
        self_attention_model="abs_pos",
        n_heads=4,
        xscaling=False,
        conv_kernel_size=5,
        conv_norm_type="group_norm8",
        dropout=0.0,
        dropout_pre_encoder=0.0,
        dropout_emb=0.0,
        dropout_att=0.0,
        sync_max_audio_length=False,
    ).double()
    for layer in stock.layers:
        layer.conv.batch_norm.eps = EPS
    stock.pos_enc.pe.zero_()
    weights = {n: p for n, p in ours.state_dict().items() if not n.startswith("proj")}
    assert weights.keys() == stock.state_dict().keys()
    for name in weights:
        if "batch_norm" in name:  # defaults of 1 and 0 would hide a swapped affine
            weights[name].copy_(torch.randn_like(weights[name]))
    stock.load_state_dict(weights)
    return stock, ours


@pytest.mark.parametrize("length", LENGTHS)
def test_encoder_equals_stock_on_one_utterance(encoders, length):
    stock, ours = encoders
    features = torch.randn(1, 80, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    weight = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    stock_input = features.clone().requires_grad_()
    stock.zero_grad()
    expected, expected_length = stock(audio_signal=stock_input, length=torch.tensor([length]))
    (expected.squeeze(0).T @ weight).square().sum().backward()

    our_input = features.clone().requires_grad_()
    ours.zero_grad()
    rows = ours.subsample(our_input, np.array([length]))
    segments = Segments(np.zeros((1, 1), np.int64), np.array([[len(rows)]]))
    packed = pack({"speech": segments}, len(rows), multiple=8)
    contexts, _ = ours(gather_rows(rows, packed.gather), packed.layout)
    contexts = contexts[: packed.layout.num_valid]
    (contexts @ weight).square().sum().backward()

    assert expected_length.tolist() == subsampled_lengths(np.array([length])).tolist() == [len(contexts)]
    torch.testing.assert_close(contexts, expected.squeeze(0).T, rtol=0, atol=1e-9)
    torch.testing.assert_close(our_input.grad, stock_input.grad, rtol=0, atol=1e-9)
    gradients = {n: p.grad for n, p in ours.named_parameters() if not n.startswith("proj")}
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_packed_front_end_equals_stock_on_each_utterance():
    torch.manual_seed(0)
    ours = PackedConvSubsampling(80, 16, 5).double()
    stock = ConvSubsampling("striding", 4, 80, 16, 5).double()
    stock.load_state_dict(ours.state_dict())
    lengths = np.array(LENGTHS)
    features = torch.randn(len(lengths), 80, int(lengths.max()), dtype=torch.float64)  # noise in the padding as well
    rows = ours(features, lengths).split(subsampled_lengths(lengths).tolist())
    for i, length in enumerate(lengths):
        expected, _ = stock(features[i : i + 1, :, :length].transpose(1, 2), torch.tensor([length]))
        torch.testing.assert_close(rows[i], expected[0], rtol=0, atol=1e-12)


def test_front_end_of_no_utterance_keeps_its_parameters_in_the_graph():
    ours = PackedConvSubsampling(80, 16, 5)
    rows = ours(torch.zeros(0, 80, 0), np.zeros(0, np.int64))
    assert rows.shape == (0, 16)
    rows.sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
