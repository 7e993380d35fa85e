"""A run that is stopped goes on bit for bit; what a kill leaves behind is never trusted."""

import csv
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

from nemo_slam.training import pretrain as module
from nemo_slam.training.checkpoints import finished_checkpoints

TIMES = {"frames_per_second", "tokens_per_second", "seconds"}


def metrics(folder):
    """{(step, is validation): figures}, without what depends on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["step"], row["loss"] == ""): {k: v for k, v in row.items() if k not in TIMES} for row in rows}


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


@pytest.mark.parametrize("options", [(), ("trainer.accumulate_grad_batches=2", "data.num_workers=2")], ids=["plain", "accumulate"])
def test_a_killed_run_repeats_at_most_an_interval_and_equals_an_unbroken_one(pretrain_config, monkeypatch, options):
    """With dropout, a validation in between, and streams that wrap (18 utterances are a few steps)."""
    whole = module.pretrain(pretrain_config(2, "name=whole", *options))
    cfg = pretrain_config(2, "name=broken", *options)
    with pytest.raises(_Killed):
        interrupted(monkeypatch, cfg, KillAt(7))
    folder = whole.parent / "broken"
    assert [step for step, _ in finished_checkpoints(folder / "checkpoints")] == [4]
    (folder / "checkpoints" / "step=000000008.ckpt.part").write_bytes(b"half a save")

    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    module.pretrain(cfg)
    assert any("resuming from step 4" in text for text in messages)
    assert not list((folder / "checkpoints").glob("*.part"))
    assert metrics(folder) == metrics(whole)
    steps = [int(step) for step, validation in metrics(folder) if not validation]
    assert steps == list(range(1, 13))

    weights = [torch.load(f / "checkpoints" / "step=000000012.ckpt", weights_only=False)["state_dict"] for f in (whole, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (folder / "broken.nemo").is_file()


def test_sigterm_saves_and_the_next_run_goes_on(pretrain_config, monkeypatch):
    class Terminate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    cfg = pretrain_config(1, "trainer.max_steps=5")
    folder = interrupted(monkeypatch, cfg, Terminate())
    assert [step for step, _ in finished_checkpoints(folder / "checkpoints")] == [3]
    assert not list(folder.glob("*.nemo"))
    module.pretrain(cfg)
    assert [step for step, _ in finished_checkpoints(folder / "checkpoints")] == [3, 4, 5]
    assert sorted({int(step) for step, _ in metrics(folder)}) == [1, 2, 3, 4, 5]


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
    assert "objectives.3.head.weight (32)" in report.split("left as initialised:")[1]
    assert "in the file but not in the model" not in report


def test_stage_3_starts_from_stage_2_and_trains_speech_alone(pretrain_config, monkeypatch):
    second = module.pretrain(pretrain_config(2, "trainer.max_steps=1"))
    messages = []
    monkeypatch.setattr(module.logging, "info", lambda text, *args: messages.append(str(text)))
    third = module.pretrain(pretrain_config(3, "trainer.max_steps=2", f"init_from={second}/slam_stage2.nemo"))
    report = next(text for text in messages if text.startswith("initialised from"))
    assert "(100.0% of the model)" in report
    assert "objectives.3.head.weight" in report.split("in the file but not in the model:")[1]
    table = next(text for text in messages if text.startswith("run:"))
    assert "stream speech" in table
    assert "stream text" not in table
    assert {name for name in next(iter(metrics(third).values())) if "/" in name and "code" not in name} == {
        "masked_speech/contrastive",
        "masked_speech/contrastive_accuracy",
        "masked_speech/diversity",
        "masked_speech/mask_rate",
    }


def test_one_stage_with_ctc(pretrain_config):
    folder = module.pretrain(pretrain_config("slam_one_stage", "trainer.max_steps=2", "model.objectives.ctc={weight: 0.03}"))
    last = metrics(folder)["2", False]
    for name in ("masked_speech/codes", "masked_text/tokens", "translation_lm/tokens", "matching", "ctc"):
        assert float(last[name]) > 0
    assert 0 <= float(last["ctc/skipped"]) <= 1


def test_starting_from_another_architecture_is_refused(pretrain_config):
    first = module.pretrain(pretrain_config(1, "trainer.max_steps=1"))
    other = "model.conformer={d_model: 48, d_ff: 64, n_heads: 2, conv_norm_groups: 4}"
    with pytest.raises(ValueError, match=r"(?s)shapes differ.*below the 50% wanted"):
        module.pretrain(pretrain_config(2, "name=other", other, f"init_from={first}/slam_stage1.nemo"))
