"""The contrastive loss grows with the masked frames times the distractors, never with the masked frames squared."""

import torch
from torch.profiler import ProfilerActivity, profile


def test_no_square_of_the_masked_frames(build_model, make_batch):
    """Of two minutes of speech: no allocation, forward or backward, has a byte for each pair of masked frames."""
    model = build_model(objectives={"masked_speech": {}}, speech_loss={"num_distractors": 5})
    with torch.no_grad():
        outputs = model(make_batch(speech=(120.0,), text=(), pairs=()))
    loss, masked = model.objectives["masked_speech"].loss, outputs.masked_speech["masked_speech"]
    frames = len(masked.index)
    assert frames > 1200
    quantized = loss.targets(outputs, masked, "masked_speech")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = loss._contrastive(outputs, masked, quantized, "masked_speech", 1.0)
        result.losses[0].total.backward()
    assert result.losses[0].count == frames
    largest = max(event.self_cpu_memory_usage for event in record.events())
    assert frames * 8 < largest < frames**2
