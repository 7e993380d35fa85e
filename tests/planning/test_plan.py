"""The planner against the network itself: parameters, operations and saved activations of real steps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemo_slam.planning.hardware import GPUS
from nemo_slam.planning.network import parameters
from nemo_slam.planning.operations import PRECISIONS
from nemo_slam.planning.plan import USABLE, Run, make_plan, memory_of, tally_of
from nemo_slam.planning.workload import Lengths, MicroBatch, expected_masked_frames

ROOT = Path(__file__).resolve().parents[2]
LARGE = (2.1, 3.7, 5.0, 4.6), (12, 25, 31, 18, 40), ((2.0, 9, 12), (3.1, 17, 15), (2.6, 14, 14))
SMALL = (2.1, 1.7), (12, 25), ((1.5, 9, 12),)
WITHIN = 0.10


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


def micro_batch(speech, text, pairs):
    spoken, paired = ([round(100 * s) for s in seconds] for seconds in (speech, [p[0] for p in pairs]))
    return MicroBatch(*map(Lengths.of, (spoken, text, paired, *([p[i] for p in pairs] for i in (1, 2)))))


def saved_bytes(model, run):
    """Bytes that autograd keeps between forward and backward, weights left out, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()  # alive while it is measured, so that no storage is given out twice
    assert loss.requires_grad
    return sum(kept.values())


def peak_bytes(run, path):
    """The most that ``run()`` holds at a time beyond what was there, from the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["args"]["Ev Idx"])]
    return max(np.cumsum(changes))


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def compare(name, planned, measured):
    print(f"{name}: planned {planned / 1e6:.2f} M, measured {measured / 1e6:.2f} M, {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=WITHIN), name


CASES = [
    pytest.param("slam_stage1", "tiny", LARGE, id="stage1-tiny"),
    pytest.param("slam_one_stage", "tiny", LARGE, id="all-tiny"),
    pytest.param("slam_one_stage", "base", SMALL, id="all-base"),
    pytest.param("slam_stage2", "tiny", SMALL, id="ctc-on-speech-tiny"),
]


@pytest.mark.parametrize(("config", "size", "lengths"), CASES)
def test_operations_and_memory_of_a_real_step(build, make_batch, tmp_path, config, size, lengths):
    """Within a tenth; docs/scaling.md says how far exactly."""
    # Rows are rounded up on a GPU alone.
    overrides = [f"model={size}", "model.conformer.kernels=torch", "model.pad_multiple=1"]
    if config == "slam_stage2":
        overrides.append("model.objectives.ctc={weight: 1.0, input: speech}")
    model, node = build(config, *overrides)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    batch, planned_batch = make_batch(*lengths), micro_batch(*lengths)
    options = {"precision": PRECISIONS["32-true"], "fused": False}

    # Attention as plain products: torch counts no fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.losses(batch)[0].backward()
    planned = sum(tally_of(node, planned_batch, **options, fused_attention=False).total().products)
    compare("operations", planned, counter.get_total_flops())

    optimizer.step()
    parameters = list(model.parameters())
    tally = tally_of(node, planned_batch, **options, mask_bytes=4)
    whole = composed(config, *overrides, "trainer.precision=32-true")
    memory = memory_of(Run(whole, GPUS["h100"], 1, fused=False), planned_batch, tally)
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    held = [bytes_of(tensors) for tensors in (parameters, gradients, state)]
    assert [memory.weights, memory.gradients, memory.optimizer] == pytest.approx(held, rel=0.001)

    def step():
        # Gradients stay where they are, as they do under DistributedDataParallel.
        optimizer.zero_grad(set_to_none=False)
        loss = model.losses(batch)[0]
        loss.backward()
        optimizer.step()

    compare("activations", tally.total().saved, saved_bytes(model, lambda: model.losses(batch)[0]))
    inputs = bytes_of([batch.speech.audio, batch.pairs.audio])
    compare("memory of a step", memory.total, sum(held) + inputs + peak_bytes(step, tmp_path / "trace.json"))


@pytest.mark.parametrize("units", ["pieces", "characters"])
def test_ctc_chooses_from_pieces_or_characters(build, make_batch, units):
    """The head's operations: those of a step with CTC less those of the same step without."""
    counted, planned = [], []
    for ctc in (f"{{weight: 0.03, units: {units}}}", "null"):
        overrides = ["model=tiny", "model.conformer.kernels=torch", f"model.objectives.ctc={ctc}"]
        model, node = build("slam_stage2", *overrides)
        batch = make_batch(*SMALL)
        batch.pairs.tokens %= 32  # what the tokenizer knows, and can spell
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.train().losses(batch)[0].backward()
        counted.append(counter.get_total_flops())
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
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train().losses(make_batch(*SMALL))[0].backward()
    settings = {"precision": PRECISIONS["32-true"], "fused": False, "fused_attention": False}
    again = tally_of(node, micro_batch(*SMALL), **settings).total()
    assert sum(again.products) == pytest.approx(counter.get_total_flops(), rel=WITHIN)
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


def test_a_misspelt_override_is_named():
    result = subprocess.run(
        [sys.executable, "scripts/plan.py", "model.optm.lr=1"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "model.optm.lr" in result.stderr
