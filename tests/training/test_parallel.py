"""Whole runs of two processes: they train as one does, under each strategy, and refuse to start unlike."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from nemo_slam.config import ConfigError, flattened, parse
from nemo_slam.training.agreement import MOST, differences
from nemo_slam.training.parallel import ParallelConfig, make_strategy, processes, refuse_strangers

STEPS = 4


@pytest.fixture
def launch(start_ranks, pretrain_config):
    """A function (name, config of each rank as overrides, common overrides) -> what each rank wrote."""

    def run(name, *overrides, ranks=((), ())):
        common = ["trainer.accelerator=cpu", f"trainer.max_steps={STEPS}", f"trainer.devices={len(ranks)}"]
        common += ["model.validation_ds=null", "probes=false", f"name={name}", *overrides]
        configs = [pretrain_config(2, *common, *own) for own in ranks]
        return start_ranks("nemo_slam.training.pretrain", configs)

    return run


# SGD: a key's bias has no gradient but noise, which Adam would turn into steps.
EXACT = ["model.conformer.dropout=0", "model.text_encoder.dropout=0"]
EXACT += ["model.optim.name=sgd", "model.optim.lr=0.05", "~model.optim.betas", "~model.optim.sched"]


def losses(tmp_path, name):
    with (tmp_path / name / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if k == "loss" or "/" in k} for row in rows]


def validated(tmp_path, name):
    """The figures of the one validation."""
    with (tmp_path / name / "metrics.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if not row["loss"]]
    return {k: float(v) for k, v in row.items() if k.startswith("val_")}


def assert_alike(results, reference, tolerance):
    for result in results:
        assert result["error"] == ""
        for kind in ("gradients", "weights"):
            assert result[kind].keys() == reference[kind].keys() != set()
            for name, tensor in reference[kind].items():
                torch.testing.assert_close(
                    result[kind][name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(launch, tmp_path, strategy):
    """With the same global batch: first gradients, losses of every step, and weights after the last.

    In float32, where another order of summation shows; test_ranks.py asks for 1e-9 in float64.
    """
    tolerance = 1e-5
    (alone,) = launch("alone", *EXACT, ranks=((),))
    together = launch("together", f"parallel.strategy={strategy}", *EXACT)
    assert_alike(together, alone, tolerance)
    reference = losses(tmp_path, "alone")
    assert len(reference) == STEPS
    for row, expected in zip(losses(tmp_path, "together"), reference, strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_with_unequal_shares_validate_as_one(launch, tmp_path, strategy):
    """With the probes, which ask more of the rank that has more pairs: in shards it would wait for the others."""
    options = [*EXACT, "trainer.max_steps=1", "trainer.val_check_interval=1", "probes=true"]
    options += ["model.validation_ds=${data.validation_ds}", "parallel.timeout_seconds=60"]
    (alone,) = launch("alone", *options, ranks=((),))
    together = launch("together", f"parallel.strategy={strategy}", *options)
    assert [result["error"] for result in (alone, *together)] == ["", "", ""]
    reference, found = (validated(tmp_path, name) for name in ("alone", "together"))
    assert found.keys() == reference.keys()
    of_objectives = {name for name in reference if not name.startswith("val_probe/")}
    assert {"val_masked_speech/codes", "val_masked_text/tokens", "val_matching", "val_loss"} < of_objectives
    names = ("effective_rank", "token_top_share", "text_given_speech", "text_without_speech")
    pooled = {f"val_probe/{name}" for name in names}
    assert all(math.isfinite(reference[name]) for name in pooled)
    for name in of_objectives | pooled:
        assert found[name] == pytest.approx(reference[name], rel=1e-5, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_draw_other_dropout(launch, strategy):
    """Lightning seeds all ranks alike when it connects them."""
    ranks = launch("dropout", "trainer.max_steps=1", f"parallel.strategy={strategy}", "seed=7")
    assert [(rank["error"], rank["seed"]) for rank in ranks] == [("", 7), ("", 8)]


def test_ddps_options_change_nothing(launch):
    """With and without accumulation, up to the order of summation in other buckets."""
    plain = ["parallel.static_graph=false", "parallel.gradient_as_bucket_view=false"]
    assert_alike(launch("tuned", *EXACT), launch("plain", *EXACT, *plain)[0], 1e-5)
    accumulate = [*EXACT, "trainer.accumulate_grad_batches=2"]
    assert_alike(launch("tuned_parts", *accumulate), launch("plain_parts", *accumulate, *plain)[0], 1e-5)


def test_shards_resume_exactly_and_leave_a_whole_model(launch, tmp_path):
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    # The schedule would follow trainer.max_steps, by which the first part is ended early.
    options = ["parallel.strategy=fsdp2", "checkpoint.every_n_steps=2", f"+model.optim.sched.max_steps={STEPS}"]
    whole = launch("whole", *options)
    launch("broken", *options, f"trainer.max_steps={STEPS // 2}")
    resumed = launch("broken", *options)
    for one, other in zip(whole, resumed, strict=True):
        assert (one["error"], other["error"]) == ("", "")
        for name, tensor in one["weights"].items():
            assert torch.equal(tensor, other["weights"][name]), name
    # The checkpoint and the .nemo are those of a model in one piece.
    checkpoint = torch.load(tmp_path / "whole/checkpoints/step_000000004.ckpt", weights_only=False)
    model = SLAMPretrainingModel.restore_from(str(tmp_path / "whole/whole.nemo"), map_location="cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[0]["weights"][name]), name
        assert torch.equal(parameter, checkpoint["state_dict"][name]), name


def test_ranks_with_other_configs_do_not_start(launch, tmp_path):
    """The rank and the key are named, on every rank, before the first step."""
    results = launch("unlike", ranks=((), ("model.optim.lr=0.5", "data.train_ds.text.max_tokens=3")))
    for result in results:
        assert result["error"].startswith("DisagreementError: the ranks were not started alike")
        assert "rank 1 (" in result["error"]
        assert "config.model.optim.lr is 0.5, elsewhere 0.002" in result["error"]
        assert "data.stream text is [" in result["error"]  # other pieces of the text: another index
        assert result["gradients"] == {}
    assert not (tmp_path / "unlike/metrics.csv").exists()


@pytest.mark.parametrize(
    "launcher", [{"SLURM_STEP_NUM_TASKS": "8"}, {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", "RANK": "3"}]
)
def test_processes_that_do_not_know_of_each_other_do_not_start(pretrain_config, monkeypatch, tmp_path, launcher):
    """trainer.devices=auto is 1 on a CPU, and where each process sees one GPU."""
    from nemo_slam.training.pretrain import pretrain

    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"started 8 processes, .*set trainer\.devices"):
        pretrain(pretrain_config(1, "name=strangers", "trainer.accelerator=cpu"))
    assert not list((tmp_path / "strangers").iterdir())


def test_one_process_in_a_shell_of_slurm_is_no_stranger(monkeypatch):
    """salloc, as with a shell on the node, leaves the job's numbers there; srun --pty also the step's."""
    alone = SimpleNamespace(world_size=1)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    refuse_strangers(alone)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match=r"env -u SLURM_STEP_NUM_TASKS"):
        refuse_strangers(alone)
    monkeypatch.setenv("SLURM_PTY_PORT", "34889")
    refuse_strangers(alone)


# ---- without processes ---------------------------------------------------------------------------


def test_differences_side_with_the_majority():
    facts = [{"config.a": 1, "code.torch": "2"}, {"config.a": 2, "code.torch": "2"}, {"config.a": 2}]
    assert differences(facts, ["x", "y", "z"]) == [
        "rank 0 (x): config.a is 1, elsewhere 2",
        'rank 2 (z): code.torch is not there, elsewhere "2"',
    ]
    assert differences(facts[:1] * 3, ["x"] * 3) == []
    assert differences([{"a": 1}, {"a": 2}], ["x", "y"]) == ["rank 1 (y): a is 2, elsewhere 1"]
    assert len(differences([{str(i): i for i in range(50)}, {}], ["x", "y"])) == 50 > MOST


def test_flattened():
    assert flattened({"a": {"b": None, "c": {}}, "d": [{"e": 1}]}, "x") == {
        "x.a.b": None,
        "x.a.c": {},
        "x.d": [{"e": 1}],
    }
    assert flattened({"a": {"b": 1}, "c": None}) == {"a.b": 1, "c": None}


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({"devices": 4, "num_nodes": 2}, 8),
        ({"devices": [0, 3], "num_nodes": 1}, 2),
        ({"devices": "3"}, 3),
        ({"devices": "0,3"}, 2),  # as Lightning reads it
        ({"devices": "3,"}, 1),
    ],
)
def test_processes(trainer, count):
    assert processes({"num_nodes": 1, "accelerator": "cpu", **trainer}) == count


def test_strategy_of_the_config():
    one = OmegaConf.create({"devices": 1, "num_nodes": 1, "accelerator": "cpu", "accumulate_grad_batches": 1})
    two, parts = OmegaConf.merge(one, {"num_nodes": 2}), {"num_nodes": 2, "accumulate_grad_batches": 2}
    assert make_strategy(ParallelConfig(), one) == "auto"
    config = parse(ParallelConfig, {"bucket_megabytes": 7, "static_graph": False, "timeout_seconds": 60}, "parallel")
    strategy = make_strategy(config, two)
    assert strategy._ddp_kwargs == {"bucket_cap_mb": 7, "static_graph": False, "gradient_as_bucket_view": True}
    assert strategy._timeout.total_seconds() == 60
    assert make_strategy(ParallelConfig(), two)._ddp_kwargs["static_graph"]
    assert not make_strategy(ParallelConfig(), OmegaConf.merge(one, parts))._ddp_kwargs["static_graph"]
    with pytest.raises(ValueError, match=r"parallel\.static_graph=true does not go with"):
        make_strategy(ParallelConfig(static_graph=True), OmegaConf.merge(one, parts))
    with pytest.raises(ValueError, match="parallel: strategy: 'fsdp' is not one of ddp, fsdp2"):
        parse(ParallelConfig, {"strategy": "fsdp"}, "parallel")
    with pytest.raises(ValueError, match="'bucket_megabyte'; did you mean 'bucket_megabytes'"):
        parse(ParallelConfig, {"bucket_megabyte": 7}, "parallel")
