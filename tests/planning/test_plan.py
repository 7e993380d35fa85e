"""The planner against the network itself: parameters, operations and saved activations of real steps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import plan_errors
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from plan_errors import SMALL, counted_operations, micro_batch

from nemo_slam.planning.hardware import GPUS
from nemo_slam.planning.network import parameters
from nemo_slam.planning.operations import PRECISIONS
from nemo_slam.planning.plan import USABLE, Run, make_plan, tally_of
from nemo_slam.planning.workload import Lengths, MicroBatch, expected_masked_frames

ROOT = Path(__file__).resolve().parents[2]


def composed(config, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose(config, list(overrides)), resolve=True)


@pytest.fixture
def build(tokenizer_model):
    """A function (config, overrides, device) -> the model and its config node."""

    def make(config, *overrides, device="cpu"):
        from nemo_slam.models.pretraining import SLAMPretrainingModel

        node = composed(config, f"data.tokenizer.model_path={tokenizer_model}", *overrides)["model"]
        with torch.device(device):
            return SLAMPretrainingModel(OmegaConf.create(node)), node

    return make


def compare(name, planned, measured, within=plan_errors.WITHIN):
    print(f"{name}: planned {planned / 1e6:.2f} M, measured {measured / 1e6:.2f} M, {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=within), name


@pytest.mark.parametrize("case", plan_errors.CASES, ids=lambda case: case.name)
def test_operations_and_memory_of_a_real_step(tokenizer_model, case):
    """Within a tenth; docs/scaling.md says how far exactly."""
    for quantity, (planned, measured) in plan_errors.measure(case, tokenizer_model).items():
        exact = quantity in ("weights", "gradients", "optimizer")
        compare(quantity, planned, measured, within=0.001 if exact else plan_errors.WITHIN)


def test_the_benchmark_writes_what_it_finds_and_fails_beyond_a_tenth(monkeypatch, tmp_path, capsys):
    found = {"operations": (109.0, 100.0), "activations": (89.0, 100.0)}
    monkeypatch.setattr(plan_errors, "CASES", plan_errors.CASES[:1])
    monkeypatch.setattr(plan_errors, "measure", lambda *_: found)
    out = tmp_path / "result.json"
    assert plan_errors.main(["--out", str(out)]) == 1
    assert capsys.readouterr().err == "stage1-tiny: activations is off by -11.0%, beyond 10%\n"
    written = json.loads(out.read_text())
    assert [(row["planned"], row["measured"]) for row in written["rows"]] == list(found.values())
    assert written["commit"]
    assert written["torch"] == torch.__version__
    del found["activations"]
    assert plan_errors.main(["--out", str(out)]) == 0


@pytest.mark.parametrize("units", ["pieces", "characters"])
def test_ctc_chooses_from_pieces_or_characters(build, make_batch, units):
    """The head's operations: those of a step with CTC less those of the same step without."""
    counted, planned = [], []
    for ctc in (f"{{weight: 0.03, units: {units}}}", "null"):
        overrides = ["model=tiny", "model.conformer.kernels=torch", f"model.objectives.ctc={ctc}"]
        model, node = build("slam_stage2", *overrides)
        batch = make_batch(*SMALL)
        batch.pairs.tokens %= 32  # what the tokenizer knows, and can spell
        model.train()
        counted.append(counted_operations(lambda m=model, b=batch: m.losses(b)[0].backward()))
        options = {"precision": PRECISIONS["32-true"], "fused": False, "fused_attention": False}
        planned.append(sum(tally_of(node, micro_batch(*SMALL), **options).total().products))
    compare(f"CTC of {units}", planned[0] - planned[1], counted[0] - counted[1])


def test_characters_without_their_tokenizer_are_an_error(tmp_path):
    """No silent guess: the file is named, and the ways out."""
    ctc = [
        "+model.objectives.ctc={weight: 0.03, units: characters}",
        f"data.tokenizer.model_path={tmp_path}/none.model",
    ]
    with pytest.raises(ValueError, match=r"units=characters.*none\.model cannot be read.*train it first"):
        plan(*ctc)
    (tmp_path / "none.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"none\.model cannot be read"):
        plan(*ctc)


def test_layers_that_are_computed_again(build, make_batch):
    """Activation checkpointing: the operations are counted, the memory falls to less than a third."""
    options = ["model=tiny", "model.conformer.kernels=torch"]
    model, node = build("slam_stage1", *options, "model.conformer.activation_checkpointing=true")
    model.train()
    counted = counted_operations(lambda: model.losses(make_batch(*SMALL))[0].backward())
    settings = {"precision": PRECISIONS["32-true"], "fused": False, "fused_attention": False}
    again = tally_of(node, micro_batch(*SMALL), **settings).total()
    assert sum(again.products) == pytest.approx(counted, rel=plan_errors.WITHIN)
    config = composed("slam_stage1", "model=slam", "data=paper", "model.conformer.activation_checkpointing=true")
    recomputed, kept = make_plan(Run(config, GPUS["h100"], 64)), plan("trainer.precision=32-true", ranks=64)
    assert recomputed.memory.activations < kept.memory.activations / 3
    assert kept.flops * 1.25 < recomputed.flops < kept.flops * 4 / 3


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("slam_stage1", ["model=slam"]),
        ("slam_one_stage", ["model=slam", "model.objectives.ctc={weight: 0.03}", "model.mask_vector.kind=learned"]),
        ("slam_stage2", ["model=base", "model.multimodal_encoder.modality_embedding=false"]),
        ("slam_stage2", ["model=tiny", "model.objectives.ctc={weight: 0.03, units: characters}"]),
        ("slam_stage3", ["model=tiny"]),
        (
            "slam_stage1",
            [
                "model=tiny",
                "model.quantizer=null",
                "model.random_projection={num_codes: 512, code_dim: 16}",
                "model.speech_loss.contrastive_weight=0",
                "model.speech_loss.diversity_weight=0",
            ],
        ),
    ],
)
def test_parameters_are_the_models(build, config, overrides):
    model, node = build(config, *overrides, device="meta")
    assert sum(parameters(node).values()) == sum(parameter.numel() for parameter in model.parameters())
    planned = parameters(node)
    layers = sum(p.numel() for p in model.speech_encoder.layers.parameters())
    layers += sum(p.numel() for p in model.speech_encoder.proj.parameters())
    assert planned["speech encoder"] == layers
    assert planned["multimodal encoder"] == sum(p.numel() for p in model.multimodal_encoder.parameters())


@pytest.mark.parametrize("length", [7, 10, 25, 300])
def test_expected_masked_frames(length):
    """Against 4,000 draws of span masks."""
    rng, span, probability = np.random.default_rng(0), 10, 0.065
    starts = rng.random((4000, max(length - span + 1, 0))) < probability
    masked = np.zeros((4000, length), bool)
    for start in range(starts.shape[1]):
        masked[:, start : start + span] |= starts[:, start : start + 1]
    (expected,) = expected_masked_frames(Lengths.of([length]), probability, span)
    assert expected == pytest.approx(masked.sum(1).mean(), rel=0.03)


def plan(*overrides, gpu="h100", ranks=8, **options):
    config = composed("slam_stage1", "model=slam", "data=paper", "trainer.precision=bf16-mixed", *overrides)
    return make_plan(Run(config, GPUS[gpu], ranks, **options))


def test_the_batch_that_fits_fits():
    """With the least accumulation that is named it does, with one less it does not."""
    needed = plan(ranks=4).accumulate
    assert needed > 1
    assert plan(f"trainer.accumulate_grad_batches={needed}", ranks=4).fits
    assert not plan(f"trainer.accumulate_grad_batches={needed - 1}", ranks=4).fits
    assert plan(gpu="h200", ranks=4).accumulate < needed
    big = plan("model.conformer.d_model=4096", "model.conformer.d_ff=16384")
    assert big.accumulate is None
    assert big.memory.fixed > USABLE * GPUS["h100"].memory


def test_what_a_step_costs_is_the_batchs_whatever_its_cut():
    """The same products over ranks and micro-batches, up to the tails of packed batches."""
    whole = plan(ranks=1)
    cut = plan("trainer.accumulate_grad_batches=4", ranks=8)
    assert 8 * cut.flops == pytest.approx(whole.flops, rel=0.01)
    assert whole.exposed == 0
    # Six operations for each parameter and row that passes it, forward and backward.
    rows, tokens = 2867200 / 4, 204800
    speech = whole.parameters["speech encoder"] + whole.parameters["multimodal encoder"]
    assert whole.flops == pytest.approx(6 * (rows * speech + tokens * whole.parameters["multimodal encoder"]), rel=0.1)


def test_operations_of_the_front_end_are_those_of_its_images():
    """Sizes of the two convolutions' outputs by torch, of one utterance of 400 frames in a line of 404."""
    model = composed("slam_stage1", "model=slam", "data=paper")["model"]
    channels, width, mels = 128, 1024, 80
    nothing = Lengths.of([])
    batch = MicroBatch(Lengths.of([400.0]), nothing, nothing, nothing, nothing)
    image = torch.nn.functional.conv2d(torch.zeros(1, 1, 404, mels), torch.zeros(1, 1, 3, 3), stride=2, padding=1)
    again = torch.nn.functional.conv2d(image, torch.zeros(1, 1, 3, 3), stride=2, padding=1)
    expected = 2 * 9 * channels * (image.numel() + channels * again.numel()) + 2 * 100 * channels * 20 * width
    tally = tally_of(model, batch, PRECISIONS["32-true"], fused=True)
    assert tally.total("front end").products[0] == expected


def test_gradients_that_are_copied_into_messages_are_there_twice():
    once, twice = (plan(f"parallel.gradient_as_bucket_view={view}", ranks=8).memory for view in ("true", "false"))
    assert twice.gradients == 2 * once.gradients
    assert plan("parallel.gradient_as_bucket_view=false", ranks=1).memory.gradients == once.gradients


def test_slow_links_show():
    assert plan(ranks=512, per_node=1).exposed > plan(ranks=512, per_node=8).exposed


def test_unknown_precision_and_optimizer_are_errors():
    with pytest.raises(ValueError, match=r"trainer\.precision: '64-true' is not one of 32-true"):
        plan("trainer.precision=64-true")
    with pytest.raises(ValueError, match=r"model\.optim\.name: 'novograd'"):
        plan("model.optim.name=novograd")
    with pytest.raises(ValueError, match=r"fp8=gemm cannot be planned"):
        plan("model.conformer.fp8=gemm")


def test_the_script_answers_without_torch():
    probe = "import sys, runpy; sys.argv = ['plan.py', '--gpus', '16', 'model=base', 'data=paper']\n"
    probe += "try: runpy.run_path('scripts/plan.py', run_name='__main__')\n"
    probe += "finally: print([m for m in ('torch', 'nemo', 'lightning') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("[]\n")
    assert "GPU-hours" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=oracle_language"], "data.train_ds lacks speech"),
        (["trainer.accumulate_grad_batches=0"], "accumulate_grad_batches must be at least 1"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, message):
    result = subprocess.run([sys.executable, "scripts/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert message in result.stderr


def test_a_misspelt_override_is_named():
    result = subprocess.run(
        [sys.executable, "scripts/plan.py", "model.optm.lr=1"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "model.optm.lr" in result.stderr
