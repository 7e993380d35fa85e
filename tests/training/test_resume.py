"""A run that is stopped goes on bit for bit; what a kill leaves behind is never trusted."""

import csv
import gc
import multiprocessing
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import sentencepiece
import torch
from lightning.pytorch import Callback

from nemo_slam.config import ConfigError
from nemo_slam.training import pretrain as module
from nemo_slam.training.checkpoints import finished_checkpoints
from nemo_slam.training.initialise import read_weights

TIMES = {"frames_per_second", "tokens_per_second", "seconds"}


def metrics(folder):
    """The rows of metrics.csv, without what depends on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def steps(folder):
    """Steps of the training rows."""
    return [int(row["step"]) for row in metrics(folder) if row["loss"]]


class _Killed(Exception):
    """Stands for a kill: nothing after it runs."""


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise _Killed


def interrupted(monkeypatch, cfg, *callbacks):
    """Run with further callbacks, which may end it."""
    original = module.make_trainer

    def with_callbacks(*args):
        trainer = original(*args)
        trainer.callbacks += callbacks
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_trainer", with_callbacks)
        return module.pretrain(cfg)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("trainer.val_check_interval=4",),  # at the very step of a checkpoint
        ("trainer.accumulate_grad_batches=2", "data.num_workers=2"),
    ],
    ids=["plain", "validation", "accumulate"],
)
def test_a_killed_run_repeats_at_most_an_interval_and_equals_an_unbroken_one(pretrain_config, monkeypatch, options):
    """With dropout, a validation in between, and streams that wrap (18 utterances are a few steps)."""
    whole = module.pretrain(pretrain_config(2, "name=whole", *options))
    cfg = pretrain_config(2, "name=broken", *options)
    with pytest.raises(_Killed):
        interrupted(monkeypatch, cfg, KillAt(7))
    folder = whole.parent / "broken"
    assert [step for step, _ in finished_checkpoints(folder / "checkpoints")] == [4]
    (folder / "checkpoints" / "step_000000008.ckpt.part").write_bytes(b"half a save")

    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    module.pretrain(cfg)
    assert any("resuming from step 4" in text for text in messages)
    assert not list((folder / "checkpoints").glob("*.part"))
    assert metrics(folder) == metrics(whole)
    assert steps(folder) == list(range(1, 13))

    weights = [
        torch.load(f / "checkpoints" / "step_000000012.ckpt", weights_only=False)["state_dict"] for f in (whole, folder)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (folder / "broken.nemo").is_file()


def test_sigterm_saves_and_the_next_run_goes_on(pretrain_config, monkeypatch):
    class Terminate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    cfg = pretrain_config(1, "trainer.max_steps=5")
    with pytest.raises(SystemExit) as ended:
        interrupted(monkeypatch, cfg, Terminate())
    assert ended.value.code == 143
    folder = Path(cfg.exp_manager.exp_dir) / cfg.name
    assert [step for step, _ in finished_checkpoints(folder / "checkpoints")] == [3]
    assert not list(folder.glob("*.nemo"))
    module.pretrain(cfg)
    assert [step for step, _ in finished_checkpoints(folder / "checkpoints")] == [3, 4, 5]
    assert steps(folder) == [1, 2, 3, 4, 5]


def test_sigterm_to_loader_workers_too_still_saves(pretrain_config, monkeypatch):
    """Slurm and systemd send it to every process there is; a worker that ended by it took the run along."""

    class TerminateAll(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                processes = [child.pid for child in multiprocessing.active_children()] + [os.getpid()]
                assert len(processes) == 3
                subprocess.run(["kill", "-TERM", *map(str, processes)], check=True)

    cfg = pretrain_config(1, "trainer.max_steps=8", "data.num_workers=2")
    with pytest.raises(SystemExit) as ended:
        interrupted(monkeypatch, cfg, TerminateAll())
    assert ended.value.code == 143
    assert [step for step, _ in finished_checkpoints(Path(cfg.exp_manager.exp_dir) / cfg.name / "checkpoints")] == [3]


def test_a_run_that_is_ended_early_is_saved_and_goes_on_exactly(pretrain_config, monkeypatch):
    """As by trainer.max_time: in the middle of an accumulated step, with no checkpoint before."""

    class OutOfTime(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 6

    options = ("trainer.accumulate_grad_batches=2", "trainer.max_steps=5", "checkpoint.every_n_steps=100")
    whole = module.pretrain(pretrain_config(1, "name=whole", *options))
    cfg = pretrain_config(1, "name=early", *options)
    folder = interrupted(monkeypatch, cfg, OutOfTime())
    assert [step for step, _ in finished_checkpoints(folder / "checkpoints")] == [3]
    assert not list(folder.glob("*.nemo"))
    module.pretrain(cfg)
    assert [row for row in metrics(folder) if row["loss"]] == [row for row in metrics(whole) if row["loss"]]
    found, expected = (read_weights(f / "checkpoints" / "step_000000005.ckpt") for f in (folder, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=-1", r"trainer\.max_steps must be positive, got -1.*max_time"),
        ("~trainer.max_steps", r"trainer\.max_steps must be positive"),
        ("trainer.max_steps=null", r"trainer\.max_steps must be positive, got None"),
        ("+trainer.limit_train_batches=3", r"limit_train_batches: .* set trainer\.max_steps"),
    ],
)
def test_a_run_without_an_end_is_refused(pretrain_config, override, message):
    """Lightning would look for a next batch for ever, or take the same few again and again."""
    with pytest.raises(ConfigError, match=message):
        module.pretrain(pretrain_config(1, override))


def test_a_finished_run_lets_go_of_its_files_and_of_sigterm(pretrain_config):
    """One process may train many times."""

    def files():
        gc.collect()  # trainer, model and streams refer to each other
        return {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}

    handler, before = signal.getsignal(signal.SIGTERM), files()
    module.pretrain(pretrain_config(1, "trainer.max_steps=1"))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not [path for path in files() - before if path.endswith("length.bin")]


def test_a_failing_save_keeps_the_previous_checkpoint(pretrain_config, monkeypatch):
    """A full disk, as torch reports it."""
    from lightning.pytorch import Trainer

    save = Trainer.save_checkpoint

    def full(self, path, *args, **kwargs):
        if self.global_step == 8:
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(28, "No space left on device")
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    cfg = pretrain_config(1)
    with pytest.raises(OSError, match="No space left"):
        module.pretrain(cfg)
    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    folder = module.pretrain(cfg)
    assert [step for step, _ in finished_checkpoints(folder / "checkpoints")] == [4, 8, 12]


def test_stage_2_starts_from_stage_1_and_says_what_was_loaded(pretrain_config, monkeypatch):
    first = module.pretrain(pretrain_config(1, "trainer.max_steps=2"))
    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    module.pretrain(pretrain_config(2, "trainer.max_steps=1", f"init_from={first}/slam_stage1.nemo"))
    report = next(text for text in messages if text.startswith("initialised from"))
    assert "left as initialised: objectives.matching.head.weight (32), objectives.matching.head.bias (1)" in report
    assert "in the file but not in the model" not in report


def test_a_start_with_another_tokenizer_is_refused(pretrain_config, corpus, tmp_path):
    """Of the same text and as many pieces, so every token is known and every shape fits, but other pieces."""
    first = module.pretrain(pretrain_config(1, "trainer.max_steps=1"))
    other = tmp_path / "other.model"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus / "train.txt"),
        model_prefix=str(other.with_suffix("")),
        vocab_size=32,
        model_type="bpe",
        minloglevel=2,
    )
    config = pretrain_config(
        *(2, "trainer.max_steps=1", f"data.tokenizer.model_path={other}", f"init_from={first}/slam_stage1.nemo")
    )
    with pytest.raises(ValueError, match=r"slam_stage1.nemo was trained with another tokenizer than .*data.tokenizer"):
        module.pretrain(config)


def test_stage_3_starts_from_stage_2_and_trains_speech_alone(pretrain_config, monkeypatch):
    second = module.pretrain(pretrain_config(2, "trainer.max_steps=1"))
    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    third = module.pretrain(pretrain_config(3, "trainer.max_steps=2", f"init_from={second}/slam_stage2.nemo"))
    report = next(text for text in messages if text.startswith("initialised from"))
    assert "(100.0% of the model)" in report
    assert "objectives.matching.head.weight" in report.split("in the file but not in the model:")[1]
    table = next(text for text in messages if text.startswith("run:"))
    rows = dict(re.findall(r"^  (\S+(?: \S+)*?)  +(.*)$", table, re.MULTILINE))
    assert rows["device"].startswith("CPU, ")
    assert rows["precision"].startswith("32-true")
    assert rows["kernels"] == "torch (kernels: auto)"
    assert rows["attention"] == "sdpa (attention: auto)"
    assert re.fullmatch(r"\d+\.\d\d M", rows["parameters"])
    assert rows["objectives"] == "masked_speech"
    assert rows["steps"] == "2, 1 micro-batch(es) each"
    assert re.match(r"18 rows, \d+\.\d\d h, \d+\.\d steps a pass; filtered: none; bad: 0", rows["stream speech"])
    assert "stream text" not in rows
    assert {name for name in metrics(third)[0] if "/" in name and "code" not in name} == {
        "masked_speech/contrastive",
        "masked_speech/contrastive_accuracy",
        "masked_speech/contrastive_skipped",
        "masked_speech/diversity",
        "masked_speech/mask_rate",
    }


def test_one_stage_with_ctc(pretrain_config):
    folder = module.pretrain(
        pretrain_config("slam_one_stage", "trainer.max_steps=2", "model.objectives.ctc={weight: 0.03}")
    )
    last = metrics(folder)[-1]
    for name in ("masked_speech/codes", "masked_text/tokens", "translation_lm/tokens", "matching", "ctc"):
        assert float(last[name]) > 0
    assert 0 <= float(last["ctc/skipped"]) <= 1


def test_starting_from_another_architecture_is_refused(pretrain_config):
    first = module.pretrain(pretrain_config(1, "trainer.max_steps=1"))
    other = "model.conformer={d_model: 48, d_ff: 64, n_heads: 2, conv_norm_groups: 4}"
    with pytest.raises(ValueError, match=r"(?s)shapes differ.*below the 50% wanted"):
        module.pretrain(pretrain_config(2, "name=other", other, f"init_from={first}/slam_stage1.nemo"))


def test_resuming_with_another_architecture_is_refused(pretrain_config):
    module.pretrain(pretrain_config(1, "trainer.max_steps=1", "checkpoint.every_n_steps=1"))
    wider = "model.conformer={d_model: 48, d_ff: 64, n_heads: 2, conv_norm_groups: 4, dropout: 0.1}"
    message = r"another architecture: .* is \(.*\) in it and \(.*\) in this model.*name=.*init_from"
    with pytest.raises(ValueError, match=message):
        module.pretrain(pretrain_config(1, wider))
    with pytest.raises(ValueError, match=r"another architecture: .* is not in it"):
        module.pretrain(pretrain_config(1, "model.multimodal_encoder.num_layers=2"))


def test_the_run_folder_cannot_be_made(pretrain_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/runs.*cannot be made.*exp_manager.exp_dir"):
        module.pretrain(pretrain_config(1, f"exp_manager.exp_dir={tmp_path}/file/runs"))


def test_ranks_must_find_the_same_checkpoint(pretrain_config, monkeypatch):
    """Nodes without a shared folder: the step that each would resume from is among what ranks compare."""
    found = []
    monkeypatch.setattr(module.Agreement, "__init__", lambda self, own: found.append(own["data.resume from step"]))
    for steps_to_take in (4, 5):
        module.pretrain(pretrain_config(1, f"trainer.max_steps={steps_to_take}"))
    assert found == [None, 4]


def test_accumulation_may_change_between_runs(pretrain_config, monkeypatch):
    """Each step still reads its own batch: the ids that a step sees do not depend on how it is cut."""
    seen = {}

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            ids = {(int(i), int(e)) for i, e in zip(batch.speech.ids, batch.speech.epochs, strict=True)}
            seen.setdefault(trainer.global_step, set()).update(ids)

    interrupted(monkeypatch, pretrain_config(1, "name=whole", "trainer.max_steps=8"), Record())
    whole, seen = seen, {}
    module.pretrain(pretrain_config(1, "name=changed", "trainer.max_steps=4"))
    interrupted(
        monkeypatch,
        pretrain_config(1, "name=changed", "trainer.max_steps=8", "trainer.accumulate_grad_batches=3"),
        Record(),
    )
    assert sorted(seen) == [4, 5, 6, 7]
    assert all(seen[step] == whole[step] for step in seen)


ROOT_SCHEDULE = "model.optim.sched={name: InverseSquareRootAnnealing, warmup_steps: 1}"


def test_a_run_that_is_made_longer_goes_on_with_the_longer_schedule(pretrain_config):
    """NeMo's schedules are at their least behind the end that they were saved with."""
    options = (ROOT_SCHEDULE, "model.validation_ds=null")
    whole = module.pretrain(pretrain_config(1, "name=whole", "trainer.max_steps=8", *options))
    module.pretrain(pretrain_config(1, "name=longer", "trainer.max_steps=4", *options))
    assert metrics(module.pretrain(pretrain_config(1, "name=longer", "trainer.max_steps=8", *options))) == metrics(
        whole
    )


def test_a_lower_rate_counts_from_the_resume_on(pretrain_config, monkeypatch):
    """As the guard advises where updates go wrong; with a schedule, and without one."""
    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    for name, schedule in (("root", ROOT_SCHEDULE), ("none", "~model.optim.sched")):
        options = (f"name={name}", schedule, "model.validation_ds=null", "trainer.max_steps=6")
        high = [row["lr"] for row in metrics(module.pretrain(pretrain_config(1, *options, f"name={name}_high")))]
        cfg = pretrain_config(1, *options, "model.optim.lr=2.0e-3")
        with pytest.raises(_Killed):
            interrupted(monkeypatch, cfg, KillAt(5))
        rates = [row["lr"] for row in metrics(module.pretrain(pretrain_config(1, *options, "model.optim.lr=2.0e-4")))]
        # The figure of a row is the rate of the step that follows.
        assert [float(rate) for rate in rates[4:]] == pytest.approx([float(rate) / 10 for rate in high[4:]])
        assert rates[:4] == high[:4]
        assert any("resuming with other settings than before" in text for text in messages)
        messages.clear()


def test_other_data_are_not_a_resume(pretrain_config):
    """And what is refused changes nothing: config.yaml is still that of the run."""
    folder = module.pretrain(pretrain_config(1, "trainer.max_steps=4"))
    config = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"other data: stream speech changed.*init_from"):
        module.pretrain(pretrain_config(1, "trainer.max_steps=8", "data.train_ds.speech.frames_per_step=500"))
    assert (folder / "config.yaml").read_text() == config


def test_a_checkpoint_is_as_good_a_start_as_a_nemo(pretrain_config, monkeypatch):
    first = module.pretrain(pretrain_config(1, "trainer.max_steps=4"))
    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    path = first / "checkpoints" / "step_000000004.ckpt"
    module.pretrain(pretrain_config(1, "name=next", "trainer.max_steps=1", f"init_from={path}"))
    assert any("(100.0% of the model)" in text for text in messages)
