"""Damaged indexes: what is opened afterwards is what the sources say, or an error names the index."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fuzzing import VALUES, damaged, inputs, told

from nemo_slam.data import index as index_module
from nemo_slam.data.bad_rows import BadRows, DataError
from nemo_slam.data.config import PairsConfig, SpeechConfig, TextConfig
from nemo_slam.data.pairs import PairStream
from nemo_slam.data.speech import SpeechStream
from nemo_slam.data.text import TextStream

TEXTS = ["press one", "please hold the line", "star", "two three", "call the number", "one two three four"]


@pytest.fixture(scope="module")
def streams(tmp_path_factory, tokenizer_model):
    """A function (kind) that opens a stream over a small corpus, and the sources' folder."""
    folder = tmp_path_factory.mktemp("fuzzed")
    rows = []
    for i, text in enumerate(TEXTS):
        soundfile.write(folder / f"{i}.wav", np.full(4800 + 800 * i, (i + 1) / 16, np.float32), 16000, subtype="FLOAT")
        rows.append({"audio_filepath": f"{i}.wav", "duration": 0.3 + 0.05 * i, "text": text, "lang": "en"})
    lines = [json.dumps(row) for row in rows]
    (folder / "m.json").write_text("\n".join([lines[0], "no JSON", *lines[1:]]) + "\n")
    (folder / "t.txt").write_bytes("\n".join([*TEXTS, ""]).encode() + b"\xff\n")

    def opened(kind: str, bad_rows: BadRows | None = None):
        options = {"seed": 0, "bad_rows": bad_rows}
        if kind == "speech":
            return SpeechStream(SpeechConfig([str(folder / "m.json")], 100), **options)
        if kind == "text":
            return TextStream(TextConfig([str(folder / "t.txt")], 100), tokenizer_model, **options)
        return PairStream(PairsConfig([str(folder / "m.json")], 100), tokenizer_model, **options)

    return opened


def content(stream) -> dict:
    """All that a stream gives: what its index says, and every example as it is loaded."""
    ids = np.arange(len(stream.index))
    batch = stream.load(ids, np.zeros_like(ids))
    tensors = {name: value.tolist() for name, value in vars(batch).items()}
    index = {name: getattr(stream.index, name).tolist() for name in stream.index.meta["arrays"] if name != "tokens"}
    order = [stream.batch(step).ids.tolist() for step in range(3)]
    return {"meta": stream.index.meta, "bad": stream.index.bad_rows(), "order": order, **index, **tensors}


def damage(generator: random.Random, folder: Path) -> str:
    """Changes one file of an index in place; says how."""
    victim = generator.choice(sorted(folder.iterdir()))
    kind = generator.choice(["bytes", "bytes", "bytes", "cut", "zeros", "gone", "value", "folder"])
    if kind == "bytes":
        victim.write_bytes(damaged(generator, victim.read_bytes()))
    elif kind == "cut":
        victim.write_bytes(victim.read_bytes()[: generator.randint(0, victim.stat().st_size)])
    elif kind == "zeros":  # what a crash of the machine may leave
        victim.write_bytes(bytes(victim.stat().st_size))
    elif kind == "gone":
        victim.unlink()
    elif kind == "folder":
        shutil.rmtree(folder)
        folder.write_text("a file in its place") if generator.random() < 0.5 else folder.mkdir()
    else:
        victim = folder / "meta.json"
        meta = json.loads(victim.read_text())
        node = generator.choice([meta, meta["arrays"], meta["files"], meta["filtered"] or meta])
        node[generator.choice([*node])] = generator.choice([*VALUES, ["<i4", -1], ["O", 3], ["<i4", 2**40], [1, "x"]])
        victim.write_text(json.dumps(meta))
    return f"{kind} {victim.name}"


def test_a_damaged_index_is_never_believed(streams, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    kinds = ("speech", "text", "pairs")
    whole = {kind: content(streams(kind)) for kind in kinds}
    assert all(len(w["bad"]) == 1 for w in whole.values())
    folders = {kind: streams(kind).index.folder for kind in kinds}
    for number, generator in inputs("index"):
        kind = kinds[number % 3]
        how = damage(generator, folders[kind])
        with told("index", number, f"{kind}: {how}"):
            assert content(streams(kind)) == whole[kind]


@pytest.mark.parametrize("kind", ["speech", "text"])
def test_of_a_large_index_a_damaged_row_is_listed_or_the_error_names_the_index(streams, tmp_path, monkeypatch, kind):
    """A file above CHECKED_BYTES is not read whole: where a row lies may be wrong, and must not be so unsaid."""
    monkeypatch.setattr(index_module, "CHECKED_BYTES", -1)
    folder = streams(kind).index.folder
    whole = content(streams(kind))
    names = {"speech": ("offset", "nbytes", "file"), "text": ("start",)}[kind]
    seen: Counter[str] = Counter()
    for number, generator in enumerate(random.Random(i) for i in range(60)):
        path = folder / f"{generator.choice(names)}.bin"
        before = path.read_bytes()
        at = generator.randrange(len(before))
        path.write_bytes(before[:at] + bytes([before[at] ^ (1 << generator.randrange(8))]) + before[at + 1 :])
        bad = BadRows(tmp_path / f"{number}.jsonl")
        try:
            stream = streams(kind, bad)
            ids = np.arange(len(stream.index))
            batch = stream.load(ids, np.zeros_like(ids))
            if kind == "speech":
                listed = bad.count() - 1  # one is no JSON, always
                assert len(batch) + listed == len(ids), path.name
                kept = dict(zip(batch.ids.tolist(), batch.audio.tolist(), strict=True))
                length = len(whole["audio"][0])
                expected = dict(zip(whole["ids"], whole["audio"], strict=True))
                assert all((row + [0.0] * length)[:length] == expected[i] for i, row in kept.items())
                seen["listed"] += listed
        except DataError as error:
            seen["named" if str(folder) in str(error) else "unnamed"] += 1
        finally:
            path.write_bytes(before)
    assert not seen["unnamed"]
    assert seen["named"] > 5
    assert kind == "text" or seen["listed"] > 5
