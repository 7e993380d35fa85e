"""What the guard keeps of a step's micro-batches."""

import weakref
from types import SimpleNamespace

import torch

from nemo_slam.data.batch import SpeechBatch, StepBatch
from nemo_slam.training.guards import StepGuard


def test_no_audio_is_kept_for_the_list_of_examples(tmp_path):
    """With 32 micro-batches of the paper's step on one GPU that would be 2 GB, which nobody plans for."""
    guard = StepGuard(tmp_path, max_consecutive=3, spike_factor=None, history=5)
    audio, ids = torch.zeros(1, 16000), torch.tensor([3])
    kept = weakref.ref(audio)
    batch = StepBatch(0, speech=SpeechBatch(audio, torch.tensor([16000]), ids, torch.zeros(1, dtype=torch.int64)))
    guard.on_train_batch_start(SimpleNamespace(accumulate_grad_batches=4), None, batch, 0)
    del audio, batch
    assert kept() is None
