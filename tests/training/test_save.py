"""A save that SIGTERM asked for: finished before any rank ends, and told to whoever started the run."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from nemo_slam.training.checkpoints import StepCheckpoint, exit_if_terminated


@pytest.mark.parametrize("first", [True, False])
def test_every_rank_waits_until_the_file_has_its_name(tmp_path, first):
    """Rank 0 flushes and renames for seconds, of a large file: a rank that ended meanwhile would have it killed."""
    seen = []
    barrier = SimpleNamespace(barrier=lambda: seen.append([path.name for path in tmp_path.iterdir()]))
    trainer = SimpleNamespace(global_step=4, is_global_zero=first, save_checkpoint=Path.touch, strategy=barrier)
    StepCheckpoint(tmp_path, every_n_steps=1, keep_last=1).save(trainer)
    assert seen == [["step_000000004.ckpt" if first else "step_000000004.ckpt.part"]]  # here there is no other rank


@pytest.mark.parametrize(
    ("environment", "local_rank", "status"),
    [
        (None, 0, 143),
        (LightningEnvironment(), 0, 143),
        (LightningEnvironment(), 1, 0),  # Lightning would answer 143 by killing rank 0
        (TorchElasticEnvironment(), 1, 143),
    ],
)
def test_the_status_that_counts_is_rank_0s(tmp_path, environment, local_rank, status):
    checkpoint = StepCheckpoint(tmp_path, every_n_steps=1, keep_last=1)
    strategy = SimpleNamespace() if environment is None else SimpleNamespace(cluster_environment=environment)
    trainer = SimpleNamespace(callbacks=[checkpoint], strategy=strategy, local_rank=local_rank)
    exit_if_terminated(trainer)
    checkpoint.terminated = True
    with pytest.raises(SystemExit) as end:
        exit_if_terminated(trainer)
    assert end.value.code == status
