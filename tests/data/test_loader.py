"""The loader: addressed by micro-batch, the same with any number of workers, ranks and restarts."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from corpus_helpers import write_manifest, write_tone

from nemo_slam.data.bad_rows import BadRowError, BadRows, EmptyStreamError
from nemo_slam.data.batch import StepBatch
from nemo_slam.data.config import ConfigError
from nemo_slam.data.loader import StepDataset, ValidationDataset, build_streams, step_loader


def node(corpus, **speech) -> dict:
    manifest = str(corpus / "manifest.json")
    return {
        "speech": {"manifest_filepath": manifest, "frames_per_step": 700, **speech},
        "text": {"text_filepath": str(corpus / "text.txt"), "tokens_per_step": 150},
        "pairs": {"manifest_filepath": manifest, "frames_per_step": 500, "negatives": "mixed"},
    }


@pytest.fixture
def streams(shared_corpus, tokenizer):
    return build_streams(node(shared_corpus), seed=11, tokenizer=tokenizer)


def assert_same(a: StepBatch, b: StepBatch) -> None:
    assert a.step == b.step
    for name in ("speech", "text", "pairs"):
        left, right = vars(getattr(a, name)), vars(getattr(b, name))
        assert all(torch.equal(left[k], right[k]) for k in left), (a.step, name)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_the_starting_point_change_nothing(streams, workers):
    dataset = StepDataset(streams, rank=1, world=2, accumulate=2)
    # 12 steps of 700 frames wrap the speech stream, which is about 5,500 frames long.
    expected = list(step_loader(dataset, 0, 24))
    assert [b.step for b in expected] == list(range(24))
    assert {int(e) for b in expected for e in b.speech.epochs} == {0, 1}
    resumed = list(step_loader(dataset, 7, 24, num_workers=workers))
    assert len(resumed) == 17
    for a, b in zip(expected[7:], resumed, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (3, 2)])
def test_each_example_once_an_epoch_over_ranks_and_micro_batches(streams, world, accumulate):
    seen = {"speech": Counter(), "text": Counter(), "pairs": Counter()}
    for rank in range(world):
        dataset = StepDataset(streams, rank, world, accumulate)
        for number in range(14 * accumulate):
            for name, batch in vars(dataset[number]).items():
                if name != "step":
                    seen[name].update(zip(batch.ids.tolist(), batch.epochs.tolist(), strict=True))
    for name, stream in streams.items():
        assert stream.sampler.steps_per_epoch <= 14
        assert {i: n for (i, epoch), n in seen[name].items() if epoch == 0} == {i: 1 for i in range(len(stream.index))}


def test_the_rank_count_may_change_on_resume(streams):
    """Steps 0-3 on three ranks, 4 onwards on two: what one process would have seen."""

    def ids(world, steps):
        found = Counter()
        for rank in range(world):
            for b in step_loader(StepDataset(streams, rank, world), steps.start, steps.stop):
                found.update(zip(b.speech.ids.tolist(), b.speech.epochs.tolist(), strict=True))
        return found

    assert ids(3, range(4)) + ids(2, range(4, 10)) == ids(1, range(10))


def test_a_missing_stream_is_none(shared_corpus, tokenizer):
    only = {"text": node(shared_corpus)["text"], "speech": None}
    batch = StepDataset(build_streams(only, seed=0, tokenizer=tokenizer))[0]
    assert batch.speech is None
    assert batch.pairs is None
    assert len(batch.text) > 0


def test_the_loader_leaves_the_global_random_state_alone(streams):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in step_loader(StepDataset(streams), 0, 3, num_workers=1):
        pass
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [1, 3])
def test_validation_covers_each_stream_once_in_fixed_batches(streams, world):
    seen = {"speech": Counter(), "text": Counter(), "pairs": Counter()}
    for rank in range(world):
        dataset = ValidationDataset(streams, rank, world)
        loader = step_loader(dataset, 0, len(dataset))
        batches = list(loader)
        assert len(loader) == len(batches) == max(s.sampler.steps_once for s in streams.values())
        for a, b in zip(batches, list(loader), strict=True):
            assert_same(a, b)
        for batch in batches:
            for name in seen:
                assert (getattr(batch, name).epochs == 0).all()
                seen[name].update(getattr(batch, name).ids.tolist())
    for name, stream in streams.items():
        assert seen[name] == {i: 1 for i in range(len(stream.index))}


def test_a_batch_past_the_end_of_validation(streams):
    dataset = ValidationDataset(streams)
    with pytest.raises(IndexError, match=f"validation has {len(dataset)} batches, asked for {len(dataset)}"):
        dataset[len(dataset)]


@pytest.fixture
def half_missing(tmp_path):
    write_tone(tmp_path / "good.wav", 1.0)
    rows = [{"audio_filepath": "good.wav" if i % 2 else f"gone{i}.wav", "duration": 1.0} for i in range(20)]
    return str(write_manifest(tmp_path / "m.json", rows))


def test_bad_rows_met_by_workers_are_listed_once(half_missing, tmp_path):
    path = tmp_path / "bad_rows.jsonl"
    config = {"speech": {"manifest_filepath": half_missing, "frames_per_step": 300}}
    for start in (0, 15):  # a run, and its continuation
        streams = build_streams(config, seed=0, bad_rows=BadRows(path))
        batches = list(step_loader(StepDataset(streams), start, start + 20, num_workers=2))
        assert {i % 2 for b in batches for i in b.speech.ids.tolist()} == {1}
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(r["line"] for r in found) == list(range(1, 20, 2))
    assert all(r["stream"] == "speech" and "gone" in r["reason"] and "step" in r for r in found)


def test_errors_of_workers_arrive_with_their_message(half_missing, tmp_path):
    config = {"speech": {"manifest_filepath": half_missing, "frames_per_step": 300}}
    streams = build_streams(config, seed=0, bad_rows=BadRows(on_bad_row="raise"))
    with pytest.raises(BadRowError, match=r"m\.json:\d+: .*gone\d+\.wav: cannot be opened"):
        list(step_loader(StepDataset(streams), 0, 10, num_workers=1))
    (tmp_path / "good.wav").unlink()
    streams = build_streams(config, seed=0, bad_rows=BadRows(tmp_path / "bad_rows.jsonl"), split="validation")
    with pytest.raises(EmptyStreamError, match=r"'validation\.speech': every row tried is bad"):
        list(step_loader(StepDataset(streams), 0, 10))


def _load_until_killed(manifest, pids):
    streams = build_streams({"speech": {"manifest_filepath": manifest, "frames_per_step": 300}}, seed=0)
    loader = iter(step_loader(StepDataset(streams), 0, 1000, num_workers=2))
    next(loader)
    pids.send([worker.pid for worker in loader._workers])
    os.kill(os.getpid(), signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_with_a_run_that_was_killed(half_missing, method):
    """However they are started: under the forkserver they are no children of the run."""
    context = multiprocessing.get_context(method)  # a process started so starts its workers so
    receive, send = context.Pipe(duplex=False)
    run = context.Process(target=_load_until_killed, args=(half_missing, send))
    run.start()
    send.close()
    pids = receive.recv()
    run.join(timeout=60)
    assert run.exitcode == -signal.SIGKILL
    end = time.monotonic() + 15
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert [pid for pid in pids if is_running(pid)] == []


def test_a_worker_ends_by_its_readers_sigterm_alone(streams):
    """A job's end is told to every process: the reader still wants what it needs to save."""
    loader = iter(step_loader(StepDataset(streams), 0, 1000, num_workers=1))
    next(loader)
    (worker,) = loader._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert [next(loader).step for _ in range(5)] == [1, 2, 3, 4, 5]
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0


def test_a_tokenizer_is_asked_for(shared_corpus):
    with pytest.raises(ConfigError, match=r"train_ds\.text needs a tokenizer: set data\.tokenizer\.model"):
        build_streams(node(shared_corpus), seed=0)


def test_wrong_rank():
    with pytest.raises(ValueError, match=r"rank \(2\) must be below world \(2\)"):
        StepDataset({}, rank=2, world=2)


def test_moving_a_batch_keeps_its_lengths_on_the_cpu(streams):
    batch = StepDataset(streams)[0]
    moved = batch.to("meta")
    assert moved.step == 0
    assert moved.speech.audio.device.type == moved.text.tokens.device.type == "meta"
    assert moved.pairs.negative_tokens.device.type == "meta"
    for part in (moved.speech, moved.text, moved.pairs):
        lengths = {v.device.type for k, v in vars(part).items() if "lengths" in k or k in ("ids", "epochs")}
        assert lengths == {"cpu"}
    assert batch.speech.audio.device.type == "cpu"
