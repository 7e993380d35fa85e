"""The stream of texts with targets: tokenizers of other text are refused, for the texts and for the targets."""

import json

import pytest

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.token_file import Tokenizer
from nemo_slam.data.tokenizer import train_on_lines
from nemo_slam.finetuning.sentences import SentenceStream

ROWS = [{"text": "uno tres dos", "translation": "one two three"}, {"text": "dos uno", "translation": "three one"}]
OTHER = ["no net tone", "ten nones"]
"""Most of the letters: no row is refused for itself, all together are."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One for each language, and one of other text."""
    folder = tmp_path_factory.mktemp("spm")
    lines = {key: [row[key] for row in ROWS] * 10 for key in ROWS[0]} | {"other": OTHER * 10}
    return {
        key: train_on_lines(own, folder / key, 20, allow_smaller=True) / "tokenizer.model" for key, own in lines.items()
    }


def open_stream(tmp_path, source, target: Tokenizer | None, encode=None):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    encode, digest = (target.encode, target.digest) if target else (encode, "classes")
    return SentenceStream(
        {"manifest_filepath": str(manifest), "tokens_per_step": 60},
        source,
        encode,
        target_digest=digest,
        target_tokenizer=target,
        seed=0,
    )


def test_tokenizers_of_the_texts_are_taken(tokenizers, tmp_path):
    stream = open_stream(tmp_path, tokenizers["text"], Tokenizer(tokenizers["translation"]))
    assert (stream.index.meta["unknown_tokens"], stream.index.meta["unknown_target_tokens"]) == (0, 0)
    assert len(stream.index) == len(ROWS)


def test_a_source_tokenizer_of_other_text_is_refused(tokenizers, tmp_path):
    message = r"data\.train_ds, text: \d+ of \d+ tokens are unknown to the tokenizer .*other/tokenizer\.model.*encoder"
    with pytest.raises(DataError, match=message):
        open_stream(tmp_path, tokenizers["other"], Tokenizer(tokenizers["translation"]))


def test_a_target_tokenizer_of_other_text_is_refused(tokenizers, tmp_path):
    other = Tokenizer(tokenizers["other"])
    encoded = other.encode([row["translation"] for row in ROWS])
    unknown, total = sum(row.count(other.unk_id) for row in encoded), sum(map(len, encoded))
    message = rf"data\.train_ds, translation: {unknown} of {total} tokens are unknown.*model\.tokenizer\.dir=null"
    for _ in range(2):  # also where the index is there already
        with pytest.raises(DataError, match=message):
            open_stream(tmp_path, tokenizers["text"], other)


def test_classes_are_no_tokens(tokenizers, tmp_path):
    unk = Tokenizer(tokenizers["text"]).unk_id
    stream = open_stream(tmp_path, tokenizers["text"], None, lambda labels: [[unk] for _ in labels])
    assert len(stream.index) == len(ROWS)
