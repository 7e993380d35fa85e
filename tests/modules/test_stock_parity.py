"""Our encoder is NeMo's ConformerEncoder, utterance by utterance: same weights, same output, same gradients."""

import numpy as np
import pytest
import torch
from nemo.collections.asr.modules import ConformerEncoder
from nemo.collections.asr.parts.submodules.subsampling import ConvSubsampling

from nemo_slam.models.encoder import SLAMEncoder
from nemo_slam.modules.conformer import ConformerConfig
from nemo_slam.modules.speech_encoder import (
    PackedConvSubsampling,
    SpeechEncoder,
    SpeechEncoderConfig,
    subsampled_lengths,
)
from nemo_slam.packing import Segments, gather_rows, pack

EPS = 1e-3
CONFORMER = {"d_model": 32, "d_ff": 64, "n_heads": 4, "conv_norm_groups": 8, "conv_norm_eps": EPS, "dropout": 0.0}
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 37, 64, 101]


def stock_encoder(layers: int) -> ConformerEncoder:
    stock = ConformerEncoder(
        feat_in=80,
        n_layers=layers,
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
    return stock


def hide_nothing(weights):
    """Affines of 1 and 0, as they are at the start, would hide a swapped one."""
    for name in weights:
        if "batch_norm" in name:
            weights[name].copy_(torch.randn_like(weights[name]))


@pytest.fixture(scope="module")
def encoders():
    """(stock, ours) with the same weights, in float64."""
    torch.manual_seed(0)
    settings = SpeechEncoderConfig(feat_in=80, conv_channels=6, num_layers=3)
    ours = SpeechEncoder(settings, ConformerConfig(**CONFORMER)).double()
    stock = stock_encoder(3)
    weights = {n: p for n, p in ours.state_dict().items() if not n.startswith("proj")}
    assert weights.keys() == stock.state_dict().keys()
    hide_nothing(weights)
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


@pytest.fixture(scope="module")
def whole_encoders():
    """(stock with 2 + 2 layers, ours with the same). NeMo's has nothing between the two halves: ours is made to pass
    rows on as they are."""
    torch.manual_seed(0)
    ours = SLAMEncoder(
        conformer=CONFORMER,
        speech_encoder={"num_layers": 2, "conv_channels": 6},
        multimodal_encoder={"num_layers": 2, "speech_positions": "none"},
    ).double()
    weights = ours.state_dict()
    hide_nothing(weights)
    for name, value in (("speech_encoder.proj.weight", torch.eye(32)), ("speech_encoder.proj.bias", torch.zeros(32))):
        weights[name].copy_(value)
    stock = stock_encoder(4)
    stock.load_state_dict({stock_name(name): p for name, p in weights.items() if stock_name(name)})
    return stock, ours


def stock_name(name: str) -> str | None:
    """Speech layers 0 and 1 are NeMo's, as are multimodal ones, two further on."""
    part, _, rest = name.partition(".")
    if part == "multimodal_encoder" and rest.startswith("layers."):
        _, number, rest = rest.split(".", 2)
        return f"layers.{int(number) + 2}.{rest}"
    return rest if part == "speech_encoder" and not rest.startswith("proj.") else None


@pytest.mark.parametrize("length", [1, 5, 37, 101])
def test_speech_and_multimodal_layers_equal_stock_on_one_utterance(whole_encoders, length):
    """Forward and gradients, through both halves, beside utterances of other lengths."""
    stock, ours = whole_encoders
    generator = torch.Generator().manual_seed(length)
    features = torch.randn(3, 80, 120, dtype=torch.float64, generator=generator)
    weight = torch.randn(32, dtype=torch.float64, generator=generator)

    stock.zero_grad()
    expected, _ = stock(audio_signal=features[1:2, :, :length], length=torch.tensor([length]))
    (expected[0].T @ weight).square().sum().backward()

    ours.zero_grad()
    found, lengths = ours(audio_signal=features, length=torch.tensor([120, length, 64]))
    found = found[1, :, : lengths[1]]
    (found.T @ weight).square().sum().backward()

    torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-9)
    compared = 0
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        if stock_name(name):
            compared += 1
            torch.testing.assert_close(
                parameter.grad, gradients[stock_name(name)], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert compared == len(gradients)


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
