"""NeMo's normalisation in our layers: against stock NeMo on a padded batch, and a script that gets it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import with_norm
from torch.nn.utils.rnn import pad_sequence

from nemo_slam.packing import SequenceLayout

WIDTH, KERNEL, EPS = 12, 5, 1e-3
LENGTHS = np.array([7, 3, 0, 11, 1])


def stock(norm):
    from nemo.collections.asr.parts.submodules.conformer_modules import ConformerConvolution

    module = ConformerConvolution(WIDTH, KERNEL, norm_type="group_norm4" if norm == "group_norm" else norm)
    if norm == "group_norm":
        module.batch_norm.eps = EPS
    return module.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", with_norm.NORMS)
def test_equals_stock_nemo_on_the_padded_batch(norm, training):
    torch.manual_seed(0)
    reference = stock(norm).train(training)
    module = with_norm.stock_convolution(norm)(WIDTH, KERNEL, 4, EPS, "torch").double().train(training)
    module.load_state_dict(reference.state_dict())
    layout = SequenceLayout.build(LENGTHS, multiple=8)
    rows = torch.randn(1, layout.num_rows, WIDTH, dtype=torch.float64)

    given = rows.clone().requires_grad_()
    found = module(given, layout)
    parts = rows[0].clone().requires_grad_()
    sequences = [part for part in parts[: LENGTHS.sum()].split(LENGTHS.tolist()) if len(part)]
    lengths = torch.tensor([len(part) for part in sequences])
    padded = pad_sequence(sequences, batch_first=True)
    mask = torch.arange(padded.shape[1]) >= lengths[:, None]
    whole = reference(padded, pad_mask=mask)
    wanted = torch.cat([out[:n] for out, n in zip(whole, lengths, strict=True)])

    valid = layout.num_valid
    assert valid < layout.num_rows
    torch.testing.assert_close(found[0, :valid], wanted)
    assert not found[0, valid:].any()
    weights = torch.randn_like(wanted)
    (found[0, :valid] * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(given.grad[0], parts.grad)
    for (name, own), theirs in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, msg=name)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer)


def test_group_norm_differs_from_ours_where_there_is_padding_alone():
    """The statistics are what differs: sequences of one length give the same output."""
    from nemo_slam.modules.convolution import PackedConvolution

    torch.manual_seed(0)
    ours = PackedConvolution(WIDTH, KERNEL, 4, EPS, "torch").double()
    theirs = with_norm.stock_convolution("group_norm")(WIDTH, KERNEL, 4, EPS, "torch").double()
    theirs.load_state_dict(ours.state_dict())
    for lengths, same in (([9, 9, 9], True), ([9, 4, 9], False)):
        layout = SequenceLayout.build(np.array(lengths))
        rows = torch.randn(1, layout.num_rows, WIDTH, dtype=torch.float64)
        assert torch.allclose(ours(rows, layout), theirs(rows, layout), rtol=1e-9, atol=1e-9) == same


def test_without_rows_there_is_nothing_to_normalise():
    module = with_norm.stock_convolution("batch_norm")(WIDTH, KERNEL, 4, EPS, "torch")
    layout = SequenceLayout.build(np.zeros(0, np.int64), multiple=4)
    assert module(torch.ones(1, 4, WIDTH), layout).tolist() == [[[0.0] * WIDTH] * 4]


def test_a_script_builds_its_layers_so(tmp_path, monkeypatch):
    from nemo_slam.modules import conformer

    monkeypatch.setattr(conformer, "PackedConvolution", conformer.PackedConvolution)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["with_norm.py"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = tmp_path / "x.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from nemo_slam.modules.conformer import ConformerConfig, ConformerStack\n"
        "config = ConformerConfig(d_model=8, d_ff=8, n_heads=2, conv_norm_groups=2)\n"
        "norms = [layer.conv.batch_norm for layer in ConformerStack(config, 2)]\n"
        "assert all(isinstance(norm, nn.BatchNorm1d) for norm in norms)\n"
        "Path(sys.argv[2]).write_text(' '.join(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    assert with_norm.main(["batch_norm", str(script), "--config-name", str(out), "a=b"]) == 0
    assert out.read_text() == f"--config-name {out} a=b"


def test_other_norms_are_refused(capsys):
    with pytest.raises(SystemExit):
        with_norm.main(["layer_norm", str(Path("x.py"))])
    assert "choose from" in capsys.readouterr().err
