"""The fine-tuning stream and its batches."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_slam.data.bad_rows import BadRows, DataError, EmptyStreamError
from nemo_slam.data.tokenizer import train_on_lines
from nemo_slam.finetuning.loader import FineTuningData, TrainingDataset, ValidationShares, validation_batches
from nemo_slam.finetuning.transcripts import Limits, TranscriptStream, Utterances, collate, ctc_frames_needed


def open_stream(manifest, tokenizer, tmp_path, **options):
    node = {"manifest_filepath": str(manifest), "frames_per_step": 300, "cache_dir": str(tmp_path / "index")}
    keywords = {k: options.pop(k) for k in ("seed", "limits", "bad_rows") if k in options}
    return TranscriptStream({**node, **options}, tokenizer / "tokenizer.model", **{"seed": 0, **keywords})


def everything(stream) -> dict[int, list[int]]:
    return {i: stream.text(i).tolist() for i in range(len(stream.index))}


@pytest.mark.parametrize("key", ["text", "translation"])
def test_tokens_are_those_of_nemos_tokenizer(corpus, tones_tokenizer, tmp_path, key):
    from nemo.collections.common.tokenizers import SentencePieceTokenizer

    nemo = SentencePieceTokenizer(str(tones_tokenizer / "tokenizer.model"))
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    found = everything(open_stream(corpus, tones_tokenizer, tmp_path, text_key=key))
    assert list(found.values()) == [nemo.text_to_ids(row[key]) for row in rows]


def test_every_utterance_once_an_epoch_with_its_own_text(corpus, tones_tokenizer, tmp_path):
    stream = open_stream(corpus, tones_tokenizer, tmp_path)
    seconds = {i: stream.index.length[i] for i in range(len(stream.index))}
    texts = everything(stream)
    seen = []
    for step in range(stream.sampler.steps_once):
        batch = stream.batch(step, once=True)
        for length, tokens in zip(batch.audio_lengths.tolist(), batch.tokens, strict=True):
            alike = [i for i in texts if texts[i] == tokens.tolist() and seconds[i] == length // 160]
            seen.append(next(i for i in alike if i not in seen))
    assert sorted(seen) == sorted(texts)


def test_other_texts_of_the_same_lengths_are_other_data(corpus, tones_tokenizer, tmp_path):
    """What a resume compares. The translations are the texts' words, reversed."""
    first, other = (open_stream(corpus, tones_tokenizer, tmp_path, text_key=key) for key in ("text", "translation"))
    assert first.index.tokens_length.tolist() == other.index.tokens_length.tolist()
    assert everything(first) != everything(other)
    assert first.index.meta["digest"] != other.index.meta["digest"]


def test_a_missing_key_says_so(corpus, tones_tokenizer, tmp_path):
    bad_rows = BadRows(tmp_path / "bad.jsonl")
    with pytest.raises(EmptyStreamError, match="no row is left"):
        open_stream(corpus, tones_tokenizer, tmp_path, text_key="summary", bad_rows=bad_rows)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert set(reasons) == {"missing key 'summary'"}
    assert len(reasons) == 12


def test_a_tokenizer_of_other_text_is_refused(corpus, tmp_path):
    other = train_on_lines(["sin sonido", "no uso dos"] * 20, tmp_path / "spm", 20, allow_smaller=True)  # no r, t, e
    with pytest.raises(DataError, match=r"unknown to the tokenizer .*model\.tokenizer\.dir=null"):
        open_stream(corpus, other, tmp_path)


def test_unknown_tokens_of_rows_that_are_left_out_do_not_count(corpus, tones_tokenizer, tmp_path):
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    long = {**rows[0], "text": " ".join([rows[0]["text"], "\u6f22"] * 40)}
    manifest = corpus.with_name("with_a_long_row.json")
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    with pytest.raises(DataError, match=r"40 of \d+ tokens are unknown"):
        open_stream(manifest, tones_tokenizer, tmp_path)
    stream = open_stream(manifest, tones_tokenizer, tmp_path, limits=Limits(max_tokens=60))
    assert (len(stream.index), stream.index.meta["unknown_tokens"]) == (len(rows), 0)


def test_ctc_frames_needed():
    assert [ctc_frames_needed(t) for t in ([], [1], [1, 2], [1, 1], [3, 3, 3])] == [0, 1, 2, 3, 5]


def test_rows_that_ctc_cannot_place_are_filtered_and_counted(corpus, tones_tokenizer, tmp_path):
    plain = open_stream(corpus, tones_tokenizer, tmp_path)
    frame = 40  # of 10 ms: a word is 30
    stream = open_stream(corpus, tones_tokenizer, tmp_path, limits=Limits(ctc_frame=frame))
    fits = [
        ctc_frames_needed(plain.text(i).tolist()) <= -(-plain.index.length[i] // frame) for i in range(len(plain.index))
    ]
    assert 0 < sum(fits) < len(fits)
    assert len(stream.index) == sum(fits)
    assert stream.index.meta["filtered"] == {"with more tokens than CTC can place": len(fits) - sum(fits)}


def test_rows_longer_than_a_decoders_positions_are_filtered(corpus, tones_tokenizer, tmp_path):
    lengths = [len(tokens) for tokens in everything(open_stream(corpus, tones_tokenizer, tmp_path)).values()]
    stream = open_stream(corpus, tones_tokenizer, tmp_path, limits=Limits(max_tokens=3))
    assert len(stream.index) == sum(n <= 3 for n in lengths)
    assert stream.index.meta["filtered"] == {"longer than 3 tokens": sum(n > 3 for n in lengths)}


def test_collate_pads_and_frames_the_text():
    utterances = Utterances(torch.zeros(2, 5), torch.tensor([3, 5]), [np.array([4]), np.array([5, 6, 7])])
    _, lengths, tokens, token_lengths = collate(utterances, pad_id=9, start_id=1, end_id=2)
    assert lengths.tolist() == [3, 5]
    assert tokens.tolist() == [[1, 4, 2, 9, 9], [1, 5, 6, 7, 2]]
    assert token_lengths.tolist() == [3, 5]


class FakeStream:
    """Steps 0 and 1 hold nothing, step 2 holds utterances 0 and 1, step 3 utterance 2 alone."""

    batches = ([], [], [0, 1], [2])

    def batch(self, step, part=0, parts=1, once=False):
        chosen = self.batches[step % 4][part::parts]
        tokens = [np.array([i], np.int64) for i in chosen]
        return Utterances(torch.zeros(len(chosen), 4), torch.full((len(chosen),), 4), tokens)


@pytest.mark.parametrize(
    ("number", "rank", "expected"), [(2, 0, [0]), (2, 1, [1]), (3, 0, [2]), (3, 1, [2]), (0, 0, [0]), (1, 1, [1])]
)
def test_no_rank_ever_gets_an_empty_batch(number, rank, expected):
    dataset = TrainingDataset(FakeStream(), collate, rank=rank, world=2)
    assert dataset[number][2].flatten().tolist() == expected


def test_what_stands_in_for_an_empty_share_is_no_larger_than_a_share(corpus, tones_tokenizer, tmp_path):
    """Few utterances for 40 ranks: the step's whole batch would be several times what a rank has room for."""
    stream = open_stream(corpus, tones_tokenizer, tmp_path, frames_per_step=300)
    shares = [len(stream.batch(0, part, 40)) for part in range(40)]
    assert min(shares) == 0
    found = [len(TrainingDataset(stream, collate, rank, world=40)[0][1]) for rank in range(40)]
    assert max(found) == max(shares)
    assert min(found) > 0
    assert max(found) < len(stream.batch(0))


def test_micro_batches_of_all_ranks_make_up_the_step(corpus, tones_tokenizer, tmp_path):
    stream = open_stream(corpus, tones_tokenizer, tmp_path, frames_per_step=900)
    whole = stream.batch(1)
    datasets = [TrainingDataset(stream, collate, rank, world=2, accumulate=2) for rank in (0, 1)]
    parts = [dataset[2 + micro] for dataset in datasets for micro in (0, 1)]
    assert sorted(n for part in parts for n in part[1].tolist()) == sorted(whole.audio_lengths.tolist())


@pytest.mark.parametrize("world", [1, 2, 5, 12])
def test_validation_covers_each_utterance_once_and_leaves_no_share_empty(corpus, tones_tokenizer, tmp_path, world):
    stream = open_stream(corpus, tones_tokenizer, tmp_path, frames_per_step=100)  # most batches are one utterance
    batches = validation_batches(stream.sampler, world)
    assert all(len(batch) == world for batch in batches)
    assert all(len(share) for batch in batches for share in batch)
    assert sorted(i for batch in batches for share in batch for i in share) == list(range(12))
    with pytest.raises(EmptyStreamError, match="validation has 12 rows, too few for 13 ranks"):
        validation_batches(stream.sampler, 13)


def test_bad_audio_in_validation_is_stood_in_for_and_said(corpus, tones_tokenizer, tmp_path, caplog):
    import logging
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(corpus.parent, copy, ignore=shutil.ignore_patterns(".nemo_slam_index"))
    stream = open_stream(copy / corpus.name, tones_tokenizer, tmp_path, frames_per_step=10**6)
    whole = validation_batches(stream.sampler, 3)[0]
    for example in whole[1]:
        (copy / f"{example}.wav").write_text("no audio")
    good = ValidationShares(stream, collate, rank=0, world=3)[0][1].tolist()
    logger = logging.getLogger("nemo_logger")
    logger.addHandler(caplog.handler)
    try:
        assert ValidationShares(stream, collate, rank=1, world=3)[0][1].tolist() == good
    finally:
        logger.removeHandler(caplog.handler)
    assert "rank 1's share of batch 0" in caplog.text
    assert "count twice" in caplog.text


def test_module_starts_at_the_trainers_step(corpus, tones_tokenizer, tmp_path):
    stream = open_stream(corpus, tones_tokenizer, tmp_path)
    data = FineTuningData(stream, stream, collate, num_workers=0, pin_memory=False)
    common = {"accumulate_grad_batches": 2, "global_rank": 0, "world_size": 1}
    data.trainer = SimpleNamespace(global_step=3, max_steps=5, **common)
    dataset = TrainingDataset(stream, collate, accumulate=2)
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for number, batch in enumerate(batches, 6):
        for ours, theirs in zip(batch, dataset[number], strict=True):
            assert torch.equal(ours, theirs)
    lengths = [n for batch in data.val_dataloader() for n in batch[1].tolist()]
    assert len(lengths) == len(stream.index)
