"""A tokenizer that does not fit its text."""

from __future__ import annotations

import json

import pytest
from corpus_helpers import sentence, write_manifest

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.config import PairsConfig, TextConfig
from nemo_slam.data.pairs import PairStream
from nemo_slam.data.text import TextStream


def test_a_tokenizer_of_other_text_is_refused(tmp_path, shared_corpus, tokenizer):
    """Each row knows most of its tokens, so that none is bad; together too few are known."""
    texts = [f"{sentence(i, 3)} 漢" for i in range(20)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    good = [json.loads(line) for line in (shared_corpus / "manifest.json").read_text().splitlines()]
    pairs = write_manifest(tmp_path / "m.json", [{**good[i], "text": text} for i, text in enumerate(texts)])
    message = r"20 of \d+ tokens are unknown to the tokenizer .*tokenizer\.model: .*scripts/train_tokenizer\.py.* more than 5% \(max_unknown\)"
    for _ in range(2):  # the second time from the index
        with pytest.raises(DataError, match=rf"a\.txt: {message}"):
            TextStream(TextConfig([str(tmp_path / "a.txt")], 100), tokenizer, seed=0)
        with pytest.raises(DataError, match=rf"m\.json: {message}"):
            PairStream(PairsConfig([str(pairs)], 300), tokenizer, seed=0)
    assert len(TextStream(TextConfig([str(tmp_path / "a.txt")], 100, max_unknown=0.2), tokenizer, seed=0).index) == 20
    assert len(PairStream(PairsConfig([str(pairs)], 300, max_unknown=0.2), tokenizer, seed=0).index) == 20
