"""The three streams: what is in a batch, and what happens to rows that cannot be used."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from corpus_helpers import sentence, write_manifest, write_tone

from nemo_slam.data.bad_rows import BadRowError, BadRows, DataError, EmptyStreamError
from nemo_slam.data.config import PairsConfig, SpeechConfig, TextConfig
from nemo_slam.data.pairs import PairStream
from nemo_slam.data.speech import SpeechStream
from nemo_slam.data.text import TextStream


def rows_of(manifest) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def unpack(tokens, lengths) -> list[list[int]]:
    return [piece.tolist() for piece in torch.split(tokens, lengths.tolist())]


def listed(path) -> list[tuple[int, str]]:
    return [(r["line"], r["reason"]) for r in map(json.loads, path.read_text().splitlines())]


# ---------------------------------------------------------------- speech


def test_speech_batch_holds_the_right_audio(shared_corpus):
    stream = SpeechStream(SpeechConfig([str(shared_corpus / "manifest.json")], 800), seed=3)
    rows = rows_of(shared_corpus / "manifest.json")
    for step in range(6):
        batch = stream.batch(step)
        assert batch.audio.dtype == torch.float32
        assert batch.audio.shape == (len(batch), int(batch.audio_lengths[-1]))
        assert (batch.audio_lengths.diff() >= 0).all()
        for audio, length, i in zip(batch.audio, batch.audio_lengths, batch.ids.tolist(), strict=True):
            assert int(length) == round(rows[i]["duration"] * 16_000)
            assert (audio[:length] == (i + 1) / 64).all()  # the level is the utterance's name
            assert (audio[length:] == 0).all()
            assert stream.where(i) == (str(shared_corpus / "manifest.json"), i + 1)


def test_parts_together_are_the_whole(shared_corpus):
    stream = SpeechStream(SpeechConfig([str(shared_corpus / "manifest.json")], 800), seed=3)
    whole = stream.batch(2)
    parts = [stream.batch(2, p, 3) for p in range(3)]
    assert torch.cat([p.ids for p in parts]).tolist() == whole.ids.tolist()
    assert sum(p.audio.sum() for p in parts) == pytest.approx(float(whole.audio.sum()), rel=1e-6)


def test_a_part_without_examples_is_an_empty_batch(shared_corpus, tokenizer):
    manifest = [str(shared_corpus / "manifest.json")]
    speech = SpeechStream(SpeechConfig(manifest, 100), seed=0).batch(0, 0, 50)
    assert speech.audio.shape[0] == len(speech) == len(speech.audio_lengths) == len(speech.epochs) == 0
    assert speech.ids.dtype == speech.epochs.dtype == speech.audio_lengths.dtype == torch.int64
    pairs = PairStream(PairsConfig(manifest, 100), tokenizer, seed=0).batch(0, 0, 50)
    assert len(pairs) == len(pairs.tokens) == len(pairs.negative_tokens) == len(pairs.negative_lengths) == 0
    text = TextStream(TextConfig([str(shared_corpus / "text.txt")], 5), tokenizer, seed=0).batch(0, 0, 50)
    assert len(text) == len(text.tokens) == len(text.lengths) == 0
    assert text.tokens.dtype == pairs.tokens.dtype == torch.int64


def test_several_manifests_offsets_rates_and_channels(tmp_path):
    write_tone(tmp_path / "one" / "mono.wav", 2.0, level=0.5)
    write_tone(tmp_path / "two" / "stereo.flac", 3.0, rate=44_100, channels=2, level=0.25)
    one, two = tmp_path / "one" / "m.json", tmp_path / "two" / "m.json"
    write_manifest(one, [{"audio_filepath": "mono.wav", "duration": 0.5, "offset": 1.0}])
    write_manifest(two, [{"audio_filepath": str(tmp_path / "two" / "stereo.flac"), "duration": 1.5, "offset": 0.2}])
    stream = SpeechStream(SpeechConfig([str(one), str(two)], 200), seed=0)
    batch = stream.load(np.array([1, 0]), np.array([0, 5]))
    assert batch.audio_lengths.tolist() == [8000, 24_000]
    assert batch.ids.tolist() == [0, 1]  # sorted by length
    assert batch.epochs.tolist() == [5, 0]
    assert batch.audio[0, 4000] == pytest.approx(0.5, abs=1e-3)
    assert batch.audio[1, 12_000] == pytest.approx(0.25, abs=1e-3)


@pytest.fixture
def bad_corpus(tmp_path):
    """Two good rows among all kinds of bad ones; line -> reason of what is met while indexing, and while loading."""
    audio = tmp_path / "audio"
    write_tone(audio / "good.wav", 1.0)
    (audio / "text.wav").write_text("no audio")
    (audio / "empty.wav").touch()
    write_tone(audio / "short.wav", 0.5)
    soundfile.write(audio / "nan.wav", np.full(16_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    write_tone(audio / "cut.wav", 1.0)
    whole = (audio / "cut.wav").read_bytes()
    (audio / "cut.wav").write_bytes(whole[: len(whole) // 3])
    good = {"audio_filepath": "audio/good.wav", "duration": 1.0, "text": "baden"}
    write_manifest(
        tmp_path / "m.json",
        [
            good,
            '{"audio_filepath": "audio/good.wav"',  # 2
            {"audio_filepath": "audio/good.wav"},  # 3
            {**good, "duration": -1},  # 4
            {**good, "duration": 0},  # 5
            b'{"audio_filepath": "caf\xe9.wav", "duration": 1}',  # 6
            {**good, "audio_filepath": "audio/missing.wav"},  # 7
            {**good, "audio_filepath": "audio/text.wav"},  # 8
            {**good, "audio_filepath": "audio/empty.wav"},  # 9
            {**good, "audio_filepath": "audio/short.wav"},  # 10
            {**good, "audio_filepath": "audio/nan.wav"},  # 11
            {**good, "audio_filepath": "audio/cut.wav"},  # 12
            {**good, "offset": 5.0},  # 13
            {**good, "duration": 7200.0},  # 14: filtered
            {**good, "duration": 0.01},  # 15: filtered
            "",
            good,  # 17
        ],
    )
    indexing = {
        2: "malformed JSON",
        3: "missing key 'duration'",
        4: "duration must be above 0, got -1",
        5: "duration must be above 0, got 0",
        6: "not UTF-8",
    }
    loading = {
        7: "cannot be opened (No such file",
        8: "not readable as audio",
        9: "the file is empty",
        10: "truncated: 0.500 s of audio where 1.000 s are said",
        11: "NaN or infinite",
        12: "truncated",
        13: "offset 5 s lies past the end",
    }
    return tmp_path / "m.json", indexing, loading


def test_bad_rows_are_left_out_and_listed_once(bad_corpus, tmp_path):
    manifest, indexing, loading = bad_corpus
    path = tmp_path / "run" / "bad_rows.jsonl"
    for _ in range(2):  # a run and its restart
        stream = SpeechStream(SpeechConfig([str(manifest)], 200), seed=0, bad_rows=BadRows(path))
        seen = []
        for step in range(10):
            batch = stream.batch(step)
            seen += [stream.where(i)[1] for i in batch.ids.tolist()]
            assert (batch.audio_lengths == 16_000).all()
        assert set(seen) == {1, 17}
    found = listed(path)
    assert sorted(line for line, _ in found) == sorted(indexing | loading)
    for line, reason in found:
        assert (indexing | loading)[line] in reason
    assert stream.index.meta["bad"] == len(indexing)
    assert stream.index.meta["filtered"] == {"shorter than 0.3 s": 1, "longer than 20 s": 1}


def test_raise_stops_at_the_first_bad_row(bad_corpus):
    manifest, _, _ = bad_corpus
    with pytest.raises(BadRowError, match=r"m\.json:2: malformed JSON.*data\.on_bad_row"):
        SpeechStream(SpeechConfig([str(manifest)], 200), seed=0, bad_rows=BadRows(on_bad_row="raise"))


def test_raise_while_loading_names_file_and_line(tmp_path):
    manifest = write_manifest(tmp_path / "m.json", [{"audio_filepath": "gone.wav", "duration": 1}])
    stream = SpeechStream(SpeechConfig([str(manifest)], 200), seed=0, bad_rows=BadRows(on_bad_row="raise"))
    with pytest.raises(BadRowError, match=r"m\.json:1: .*gone\.wav: cannot be opened"):
        stream.batch(0)


def test_every_row_bad(tmp_path):
    path = tmp_path / "bad_rows.jsonl"
    broken = write_manifest(tmp_path / "broken.json", ["{", "{"])
    with pytest.raises(
        EmptyStreamError, match=r"stream 'speech' is empty.*bad: 2, listed in .*, the first: .*broken\.json:1: malf"
    ):
        SpeechStream(SpeechConfig([str(broken)], 200), seed=0, bad_rows=BadRows(path))
    gone = write_manifest(tmp_path / "gone.json", [{"audio_filepath": f"{i}.wav", "duration": 1} for i in range(9)])
    stream = SpeechStream(SpeechConfig([str(gone)], 200), seed=0, bad_rows=BadRows(path))
    with pytest.raises(EmptyStreamError, match=r"'speech': every row tried is bad \(all 9 rows\).*bad_rows\.jsonl"):
        stream.batch(0)
    assert len(listed(path)) == 11


def test_one_good_row_keeps_a_stream_alive(tmp_path):
    write_tone(tmp_path / "good.wav", 1.0)
    names = [f"gone{i}.wav" for i in range(30)] + ["good.wav"]
    manifest = write_manifest(tmp_path / "m.json", [{"audio_filepath": n, "duration": 1} for n in names])
    stream = SpeechStream(SpeechConfig([str(manifest)], 100), seed=0)
    batches = [stream.batch(k) for k in range(31)]
    assert sum(len(b) for b in batches) == 1
    assert {tuple(b.audio.shape) for b in batches} == {(0, 0), (1, 16_000)}


def test_empty_stream_says_what_was_filtered(shared_corpus):
    with pytest.raises(EmptyStreamError, match=r"'speech' is empty.*filtered: 40 longer than 0\.2 s; bad: 0"):
        SpeechStream(
            SpeechConfig([str(shared_corpus / "manifest.json")], 100, min_duration=0.1, max_duration=0.2), seed=0
        )


def test_empty_manifest(tmp_path, tokenizer):
    (tmp_path / "m.json").touch()
    with pytest.raises(EmptyStreamError, match="'speech' is empty"):
        SpeechStream(SpeechConfig([str(tmp_path / "m.json")], 100), seed=0)
    with pytest.raises(EmptyStreamError, match="'pairs' is empty"):
        PairStream(PairsConfig([str(tmp_path / "m.json")], 100), tokenizer, seed=0)


def test_a_manifest_that_changes_under_the_run_is_noticed(tmp_path):
    write_tone(tmp_path / "a.wav", 2.0)
    manifest = write_manifest(tmp_path / "m.json", [{"audio_filepath": "a.wav", "duration": d} for d in (1.5, 1.0)])
    rows = BadRows(tmp_path / "bad_rows.jsonl")
    stream = SpeechStream(SpeechConfig([str(manifest)], 500), seed=0, bad_rows=rows)
    manifest.write_text(manifest.read_text().replace("1.5", "1.2"))
    assert stream.batch(0).ids.tolist() == [1, 1]
    assert "was changed while in use" in listed(rows.path)[0][1]


# ---------------------------------------------------------------- text


def test_text_is_what_the_tokenizer_says(shared_corpus, tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    lines = (shared_corpus / "text.txt").read_text().splitlines()
    stream = TextStream(TextConfig([str(shared_corpus / "text.txt")], 300), tokenizer, seed=0)
    assert stream.index.meta["total_length"] == sum(map(len, model.encode(lines)))
    for step in range(4):
        batch = stream.batch(step)
        assert batch.tokens.dtype == torch.int64
        assert (batch.lengths.diff() >= 0).all()
        for tokens, i in zip(unpack(batch.tokens, batch.lengths), batch.ids.tolist(), strict=True):
            assert tokens == model.encode(lines[i])
            assert stream.where(i)[1] == i + 1


def test_long_lines_are_cut_evenly(tmp_path, tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    (tmp_path / "a.txt").write_text(sentence(1, 40) + "\n" + sentence(2, 2) + "\n")
    stream = TextStream(TextConfig([str(tmp_path / "a.txt")], 300, max_tokens=10), tokenizer, seed=0)
    pieces = [unpack(b.tokens, b.lengths)[0] for i in range(len(stream.index)) for b in [stream.load(*2 * [np.r_[i]])]]
    first = [p for i, p in enumerate(pieces) if stream.where(i)[1] == 1]
    assert list(itertools.chain(*first)) == model.encode(sentence(1, 40))
    sizes = [len(p) for p in first]
    assert max(sizes) <= 10
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-sum(sizes) // 10)
    assert stream.index.meta["split_lines"] == 1


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_lines_text_and_its_bad_rows(tmp_path, tokenizer, suffix):
    path = tmp_path / f"a.{suffix}"
    write_manifest(
        path,
        [
            {"text": "baden kefal", "other": 1},
            {"text": ""},
            {"txt": "x"},
            b'{"text": "caf\xe9"}',
            "{",
            {"text": "漢字"},
            {"text": "baden 漢"},
            "",
            {"text": " ".join(sentence(i, 12) for i in range(4))},
        ],
    )
    rows = BadRows(tmp_path / "bad_rows.jsonl")
    stream = TextStream(TextConfig([str(path)], 200), tokenizer, seed=0, bad_rows=rows)
    assert [stream.where(i)[1] for i in range(len(stream.index))] == [1, 7, 9]
    assert dict(listed(rows.path)) == {
        2: "text is empty",
        3: "missing key 'text'",
        4: "not UTF-8 (byte 0xe9 at column 13)",
        5: "malformed JSON (Expecting property name enclosed in double quotes at column 2)",
        6: "text is unknown to the tokenizer: 1 of 2 tokens",
    }
    assert stream.index.meta["unknown_tokens"] == 1  # a row with a few unknown characters is kept
    assert stream.index.meta["filtered"] == {"blank lines": 1}


def test_plain_text_bad_lines(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"baden\n\n  \nke\xff\n\xef\xbb\xbf\nmofal\n")
    rows = BadRows(tmp_path / "bad_rows.jsonl")
    stream = TextStream(TextConfig([str(tmp_path / "a.txt")], 100, min_tokens=2), tokenizer, seed=0, bad_rows=rows)
    assert stream.index.meta["filtered"]["blank lines"] == 2
    assert [line for line, _ in listed(rows.path)] == [4, 5]


def test_short_lines_are_filtered(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("b\n" + sentence(0, 9) + "\n")
    stream = TextStream(TextConfig([str(tmp_path / "a.txt")], 100, min_tokens=8), tokenizer, seed=0)
    assert stream.index.meta["filtered"] == {"shorter than 8 tokens": 1}
    assert len(stream.index) == 1


def test_empty_text_stream(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(EmptyStreamError, match=r"'text' is empty.*2 blank lines"):
        TextStream(TextConfig([str(tmp_path / "a.txt")], 100), tokenizer, seed=0)


def test_another_tokenizer_is_another_index(shared_corpus, tokenizer, tmp_path):
    config = TextConfig([str(shared_corpus / "text.txt")], 300)
    first = TextStream(config, tokenizer, seed=0)
    (tmp_path / "t.txt").write_text((tokenizer.parent / "text.txt").read_text())
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"), model_prefix=str(tmp_path / "t"), vocab_size=50, model_type="bpe", minloglevel=2
    )
    second = TextStream(config, tmp_path / "t.model", seed=0)
    assert first.index.folder != second.index.folder
    assert first.index.meta["total_length"] < second.index.meta["total_length"]


def test_wrong_tokenizer_is_named(shared_corpus, tmp_path):
    config = TextConfig([str(shared_corpus / "text.txt")], 300)
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*none\.model.*train_tokenizer"):
        TextStream(config, tmp_path / "none.model", seed=0)
    (tmp_path / "bad.model").write_text("not a model")
    with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
        TextStream(config, tmp_path / "bad.model", seed=0)


# ---------------------------------------------------------------- pairs


def test_pair_batch(shared_corpus, tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    rows = rows_of(shared_corpus / "manifest.json")
    stream = PairStream(PairsConfig([str(shared_corpus / "manifest.json")], 600), tokenizer, seed=0)
    texts = {tuple(model.encode(r["text"])) for r in rows}
    for step in range(8):
        batch = stream.batch(step)
        assert (batch.audio_lengths.diff() >= 0).all()
        own, other = unpack(batch.tokens, batch.lengths), unpack(batch.negative_tokens, batch.negative_lengths)
        for audio, i, text, negative in zip(batch.audio, batch.ids.tolist(), own, other, strict=True):
            assert float(audio[0]) == (i + 1) / 64
            assert text == model.encode(rows[i]["text"])
            assert negative != text
            assert tuple(negative) in texts
        again = stream.batch(step)
        assert torch.equal(batch.negative_tokens, again.negative_tokens)


def test_pair_rows_that_cannot_be_used(tmp_path, tokenizer):
    write_tone(tmp_path / "a.wav", 1.0)
    good = {"audio_filepath": "a.wav", "duration": 1.0, "text": "baden"}
    manifest = write_manifest(
        tmp_path / "m.json",
        [
            good,
            {**good, "text": "kefal"},
            {**good, "text": " "},
            {k: v for k, v in good.items() if k != "text"},
            {**good, "text": "漢字"},
            {**good, "text": sentence(0, 50)},
        ],
    )
    rows = BadRows(tmp_path / "bad_rows.jsonl")
    stream = PairStream(PairsConfig([str(manifest)], 300, max_tokens=20), tokenizer, seed=0, bad_rows=rows)
    assert len(stream.index) == 2
    assert sorted(line for line, _ in listed(rows.path)) == [3, 4, 5]
    assert stream.index.meta["filtered"] == {"longer than 20 tokens": 1}  # a transcript is never cut


def test_one_text_for_all_is_an_error(tmp_path, tokenizer):
    write_tone(tmp_path / "a.wav", 1.0)
    texts = ["baden kefal", "Baden, kefal!", " baden  KEFAL"]
    manifest = write_manifest(
        tmp_path / "m.json", [{"audio_filepath": "a.wav", "duration": 1.0, "text": t} for t in texts]
    )
    with pytest.raises(DataError, match="all 3 rows have the same text"):
        PairStream(PairsConfig([str(manifest)], 300), tokenizer, seed=0)


@pytest.mark.parametrize("kind", ["speech", "text", "pairs"])
def test_streams_pickle(shared_corpus, tokenizer, kind):
    """What a loader worker started by spawn needs."""
    manifest = [str(shared_corpus / "manifest.json")]
    stream = {
        "speech": lambda: SpeechStream(SpeechConfig(manifest, 300), seed=0),
        "text": lambda: TextStream(TextConfig([str(shared_corpus / "text.txt")], 100), tokenizer, seed=0),
        "pairs": lambda: PairStream(PairsConfig(manifest, 300), tokenizer, seed=0),
    }[kind]()
    expected = stream.batch(1)
    again = pickle.loads(pickle.dumps(stream)).batch(1)
    for name, value in vars(expected).items():
        assert torch.equal(value, getattr(again, name)), name
