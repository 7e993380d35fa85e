"""Updates that would do harm are skipped and listed; a run that only skips stops; memory errors name the knobs."""

import csv
import json
from types import SimpleNamespace

import guard_worker
import pytest
import torch
import torch.multiprocessing as multiprocessing
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from nemo_slam.models.pretraining import SLAMPretrainingModel
from nemo_slam.training import pretrain as module
from nemo_slam.training.guards import StepGuard, memory_advice

STREAMS = ("speech", "text", "pairs")


class Watch(Callback):
    """Weights and Adam's first moments after every step, and the examples of every micro-batch."""

    def __init__(self):
        self.weights, self.moments, self.examples = {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        seen = self.examples.setdefault(trainer.global_step + 1, {name: [] for name in STREAMS})
        for name in STREAMS:
            part = getattr(batch, name)
            seen[name] += [] if part is None else part.ids.tolist()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = trainer.optimizers[0].state
        self.weights[trainer.global_step] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        self.moments[trainer.global_step] = [state[p]["exp_avg"].clone() for p in pl_module.parameters() if p in state]


class _Killed(Exception):
    """Stands for a kill: nothing after it runs."""


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise _Killed


@pytest.fixture
def run(monkeypatch):
    """A function (config, {step: factor of the loss}, callbacks) -> the run folder."""
    make_trainer, training_step = module.make_trainer, SLAMPretrainingModel.training_step

    def build(cfg, factors, *callbacks):
        def with_callbacks(*args):
            trainer = make_trainer(*args)
            trainer.callbacks += callbacks
            return trainer

        def scaled(self, batch, batch_idx):
            return training_step(self, batch, batch_idx) * factors.get(self.trainer.global_step + 1, 1.0)

        monkeypatch.setattr(module, "make_trainer", with_callbacks)
        monkeypatch.setattr(SLAMPretrainingModel, "training_step", scaled)
        return module.pretrain(cfg)

    return build


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]


def column(folder, name):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row["loss"]]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_changes_nothing(pretrain_config, run, accumulate):
    watch = Watch()
    options = ("trainer.max_steps=5", f"trainer.accumulate_grad_batches={accumulate}", "trainer.val_check_interval=100")
    folder = run(pretrain_config(2, *options), {3: NAN, 5: INF}, watch)
    for step, unchanged in ((2, False), (3, True), (4, False), (5, True)):
        before, after = watch.weights[step - 1], watch.weights[step]
        assert all(torch.equal(before[name], after[name]) for name in before) == unchanged
        moments = zip(watch.moments[step - 1], watch.moments[step], strict=True)
        assert all(torch.equal(a, b) for a, b in moments) == unchanged
    records = skipped(folder)
    assert [(r["step"], r["reason"]) for r in records] == [(3, "the loss is not finite"), (5, "the loss is not finite")]
    for record in records:
        assert record["ids"] == watch.examples[record["step"]]
        assert all(record["ids"][name] for name in STREAMS)
        assert {name: len(ids) for name, ids in record["ids"].items()} == {
            name: len(epochs) for name, epochs in record["epochs"].items()
        }
    assert column(folder, "skipped_steps") == [0, 0, 1, 0, 1]


def test_a_gradient_spike_is_skipped_once_there_is_a_history(pretrain_config, run):
    watch = Watch()
    guard = "guard={max_consecutive: 10, spike_factor: 20.0, history: 4}"
    # Step 2 is as steep, but two norms are no history; gradients are clipped, so it does no harm.
    folder = run(pretrain_config(1, "trainer.max_steps=8", guard), {2: 1e4, 7: 1e4}, watch)
    (record,) = skipped(folder)
    assert record["step"] == 7
    assert record["reason"].startswith("the gradient norm")
    assert record["ids"] == watch.examples[7]
    assert record["gradient_norm"] > 1e3
    assert all(torch.equal(watch.weights[6][name], watch.weights[7][name]) for name in watch.weights[6])


def test_steps_without_an_example_are_no_history(tmp_path):
    """With a budget below half an utterance most steps are empty: their norm of 0 is not the usual one."""
    guard = StepGuard(tmp_path, max_consecutive=3, spike_factor=20.0, history=2)
    guard.load_state_dict({"norms": [0.0, 0.0], "consecutive": 0})  # of a checkpoint that has them
    trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, is_global_zero=True)
    model = SimpleNamespace(train_metrics=SimpleNamespace(add=lambda name, value: None))
    parameter = torch.nn.Parameter(torch.zeros(1))
    applied = []
    empty = SimpleNamespace(speech=None, text=None, pairs=None)
    for norm in (0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 1.5, 100.0):
        parameter.grad = torch.tensor([norm])
        guard.on_train_batch_start(trainer, model, empty, 0)
        guard.on_before_backward(trainer, model, torch.tensor(norm))
        guard.on_before_optimizer_step(trainer, model, SimpleNamespace(param_groups=[{"params": [parameter]}]))
        applied.append(parameter.grad is not None)
    assert applied == [True] * 10 + [False]


def test_so_many_in_a_row_stop_the_run_and_a_good_one_starts_again(pretrain_config, run):
    cfg = pretrain_config(1, "guard={max_consecutive: 3, spike_factor: null, history: 4}")
    bad = {step: NAN for step in (2, 3, 5, 6, 7)}
    with pytest.raises(
        RuntimeError, match=r"step 7: 3 updates in a row were skipped.*not finite.*guard\.max_consecutive"
    ):
        run(cfg, bad)
    folder = module.Path(cfg.exp_manager.exp_dir) / cfg.name
    assert [record["step"] for record in skipped(folder)] == [2, 3, 5, 6, 7]


def test_a_resumed_run_skips_as_an_unbroken_one(pretrain_config, run):
    """The checkpoint of step 4 lies between two skipped steps; the spike at 9 is one by norms from before it."""
    guard = "guard={max_consecutive: 3, spike_factor: 20.0, history: 5}"
    factors = {4: NAN, 5: INF, 9: 1e4}
    whole = run(pretrain_config(1, "name=whole", guard), factors)
    cfg = pretrain_config(1, "name=broken", guard)
    with pytest.raises(_Killed):
        run(cfg, factors, KillAt(6))
    broken = whole.parent / "broken"
    assert [record["step"] for record in skipped(broken)] == [4, 5]
    run(cfg, factors)
    assert [record["step"] for record in skipped(whole)] == [4, 5, 9]
    assert skipped(broken) == skipped(whole)
    for name in ("loss", "skipped_steps", "masked_text/tokens"):
        assert [str(x) for x in column(broken, name)] == [str(x) for x in column(whole, name)]
    last = [torch.load(f / "checkpoints/step_000000012.ckpt", weights_only=False) for f in (whole, broken)]
    assert all(torch.equal(last[0]["state_dict"][n], last[1]["state_dict"][n]) for n in last[0]["state_dict"])


def test_without_a_guard_everything_is_applied(pretrain_config, run):
    folder = run(pretrain_config(1, "trainer.max_steps=3", "guard=null", "checkpoint.every_n_steps=3"), {2: NAN})
    assert not (folder / "skipped_steps.jsonl").exists()
    weights = torch.load(folder / "checkpoints/step_000000003.ckpt", weights_only=False)["state_dict"]
    assert not torch.isfinite(weights["speech_encoder.proj.weight"]).all()


def test_all_ranks_skip_alike_and_all_examples_are_listed(tmp_path):
    """Two processes; the loss of one alone is not a number."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_slam.models.pretraining"])
    processes = [context.Process(target=guard_worker.work, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], torch.ones(3))
    assert first[1] == second[1]
    assert (len(first[1]["norms"]), first[1]["consecutive"]) == (1, 2)
    assert first[2]["skipped_steps"] == 2
    assert [(r["step"], r["ids"]["text"], r["epochs"]["text"]) for r in skipped(tmp_path)] == [
        (2, [1, 11], [1, 1]),
        (3, [2, 12], [2, 2]),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_consecutive": 0}, r"guard\.max_consecutive and guard\.history must be positive, got 0"),
        ({"spike_factor": 1.0}, r"guard\.spike_factor must be above 1 or null, got 1\.0"),
    ],
)
def test_values_out_of_range(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        StepGuard(tmp_path, **{"max_consecutive": 3, "spike_factor": 9.0, "history": 4, **changes})


SETTINGS = OmegaConf.create(
    {
        "trainer": {"accumulate_grad_batches": 3},
        "model": {"max_positions": None},
        "data": {"train_ds": {"speech": {"frames_per_step": 700}, "text": {"tokens_per_step": 90}, "pairs": None}},
    }
)


def exhaust_the_cpu():
    torch.empty(1 << 55, dtype=torch.uint8)


def exhaust_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("exhaust", [exhaust_the_cpu, exhaust_a_gpu])
def test_running_out_of_memory_names_the_knobs(exhaust):
    with pytest.raises(RuntimeError) as caught, memory_advice(SETTINGS):
        exhaust()
    text = str(caught.value)
    assert "allocate" in text.splitlines()[0]
    assert type(caught.value) is type(caught.value.__cause__)
    assert "trainer.accumulate_grad_batches is raised (now 3; 6 halves a micro-batch)" in text
    assert "data.train_ds.speech.frames_per_step (now 700), data.train_ds.text.tokens_per_step (now 90)" in text


def test_running_out_of_memory_in_fine_tuning_names_its_own():
    """Whose data section is one stream, and whose stock models have no bound on positions."""
    train = {"manifest_filepath": ["a", "b"], "frames_per_step": 700, "max_duration": 20.0, "cache_dir": None}
    settings = OmegaConf.create({**SETTINGS, "data": {"train_ds": train}, "model": {}})
    with pytest.raises(RuntimeError) as caught, memory_advice(settings):
        exhaust_the_cpu()
    assert "lower data.train_ds.frames_per_step (now 700), or" in str(caught.value)
    assert "max_positions" not in str(caught.value)


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"), memory_advice(SETTINGS):
        raise RuntimeError("shapes do not match")
