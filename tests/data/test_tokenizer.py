"""Tokenizers: NeMo's files, the same bytes every time, clear limits, and a corpus's own tokenizer on first use."""

import json
import logging
import multiprocessing
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece

from nemo_slam.data.corpora.files import sha256
from nemo_slam.data.tokenizer import TokenizerError, ensure_tokenizer, read_lines, train_on_lines, train_tokenizer

FILES = ("tokenizer.model", "tokenizer.vocab", "vocab.txt")
# Enough different words for a hundred pieces or two, over 19 letters.
SYLLABLES = ["pa", "te", "ki", "lo", "mu", "sa", "ren", "bid", "vor", "gun", "hy", "cel", "fas"]
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES if first != second]


def _text(path: Path, lines: int = 300, seed: int = 0, words: list[str] = WORDS) -> Path:
    draw = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(draw.choices(words, k=6)) + "\n" for _ in range(lines)), encoding="utf-8")
    return path


def _load(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_tokenizer_gives_its_text_back(tmp_path, model_type):
    text = _text(tmp_path / "text.txt")
    out = train_tokenizer([text], tmp_path / "out", 60, model_type=model_type)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    model = _load(out)
    assert model.get_piece_size() == 60
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, -1, -1, -1)
    for line in text.read_text().splitlines()[:50]:
        assert model.decode(model.encode(line)) == line
        assert 0 not in model.encode(line)


def test_vocabulary_files_are_those_sentencepiece_and_nemo_write(tmp_path):
    """tokenizer.vocab against SentencePiece's own writer; vocab.txt against NeMo's rule, spelled out."""
    text = _text(tmp_path / "text.txt")
    out = train_tokenizer([text], tmp_path / "out", 60, sequence_symbols=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "own"), vocab_size=60, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        character_coverage=1.0, num_threads=2, minloglevel=2,
    )  # fmt: skip
    own = (tmp_path / "own.vocab").read_text(encoding="utf-8")
    assert (out / "tokenizer.vocab").read_text(encoding="utf-8") == own
    pieces = [line.split("\t")[0] for line in own.splitlines()]
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<pad>"]
    expected = [piece[1:] or "▁" if piece[0] == "▁" else "##" + piece for piece in pieces[4:]]
    assert (out / "vocab.txt").read_text(encoding="utf-8").splitlines() == expected
    model = _load(out)
    assert (model.bos_id(), model.eos_id(), model.pad_id()) == (1, 2, 3)


@pytest.mark.slow
def test_nemo_reads_the_folder_and_writes_the_same_vocabulary(tmp_path):
    from nemo.collections.common.tokenizers import sentencepiece_tokenizer as module

    text = _text(tmp_path / "text.txt")
    out = train_tokenizer([text], tmp_path / "out", 60)
    _, vocabulary = module.create_spt_model(str(text), 60, -1, False, output_dir=str(tmp_path / "nemo"))
    theirs = Path(vocabulary).read_text(encoding="utf-8").splitlines()
    ours = (out / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(theirs) == sorted(ours)
    tokenizer = module.SentencePieceTokenizer(str(out / "tokenizer.model"))
    assert tokenizer.vocab_size == 60
    assert tokenizer.ids_to_text(tokenizer.text_to_ids("paki loren mute")) == "paki loren mute"


@pytest.mark.parametrize("options", [{}, {"model_type": "bpe"}, {"byte_fallback": True}, {"allow_smaller": True}])
def test_the_same_text_gives_the_same_bytes_wherever_it_lies(tmp_path, options):
    folders = []
    for name in ("one", "another_place"):
        text = _text(tmp_path / name / f"{name}.txt")
        folders.append(train_tokenizer([text], tmp_path / name / "out", 320, **{"allow_smaller": True, **options}))
    for name in FILES:
        assert sha256(folders[0] / name) == sha256(folders[1] / name)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_large_a_vocabulary_names_the_largest_possible(tmp_path, model_type):
    text = _text(tmp_path / "text.txt", lines=40)
    with pytest.raises(TokenizerError, match=r"5000 pieces: this text carries at most (\d+).*--allow-smaller") as error:
        train_tokenizer([text], tmp_path / "out", 5000, model_type=model_type)
    assert not (tmp_path / "out").exists()
    largest = int(str(error.value).split("at most ")[1].split(".")[0])
    out = train_tokenizer([text], tmp_path / "out", largest, model_type=model_type)
    assert _load(out).get_piece_size() == largest


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_allow_smaller_trains_the_largest_and_says_so(tmp_path, caplog, model_type):
    text = _text(tmp_path / "text.txt", lines=40)
    with caplog.at_level(logging.WARNING):
        out = train_tokenizer([text], tmp_path / "out", 5000, model_type=model_type, allow_smaller=True)
    size = _load(out).get_piece_size()
    assert len(set("".join(WORDS))) < size < 5000
    assert f"the text carries {size} pieces only, not 5000" in caplog.text


def test_too_small_a_vocabulary_names_the_smallest_possible(tmp_path):
    text = _text(tmp_path / "text.txt")
    smallest = len(set("".join(WORDS))) + 2  # the characters, the word boundary, <unk>
    with pytest.raises(TokenizerError, match=rf"5 pieces: the characters and symbols alone need {smallest}\."):
        train_tokenizer([text], tmp_path / "out", 5, allow_smaller=True)


def test_characters_alone(tmp_path):
    """All of them, however rare: SentencePiece itself drops the rarest where there is no room."""
    text = _text(tmp_path / "text.txt")
    with text.open("a", encoding="utf-8") as file:
        file.write("ñ\n")
    characters = {*"".join(WORDS), "ñ", "▁"}
    model = _load(train_tokenizer([text], tmp_path / "out", 90, model_type="char", allow_smaller=True))
    assert {model.id_to_piece(i) for i in range(model.get_piece_size())} == {"<unk>", *characters}
    line = text.read_text(encoding="utf-8").splitlines()[0]
    assert model.encode(line, out_type=str) == list("▁" + line.replace(" ", "▁"))
    needed = len(characters) + 1
    with pytest.raises(TokenizerError, match=rf"{needed - 1} pieces: the characters and symbols alone need {needed}\."):
        train_tokenizer([text], tmp_path / "few", needed - 1, model_type="char", allow_smaller=True)


@pytest.mark.parametrize(
    ("line", "characters"),
    [("ﬁn", "fin"), ("½", "1⁄2"), ("e\u0301te\u0301", "ét"), ("a\u200bb\tc\u00a0d", "abcd")],
    ids=["ligature", "fraction", "accents", "spaces"],
)
@pytest.mark.parametrize("options", [{}, {"sequence_symbols": True}, {"byte_fallback": True}], ids=str)
def test_characters_are_counted_as_sentencepiece_normalises_them(tmp_path, line, characters, options):
    """None is dropped where all fit, and the smallest size that fits is not refused."""
    wanted = {*characters, "▁"}
    symbols = 1 + 3 * ("sequence_symbols" in options) + 256 * ("byte_fallback" in options)
    needed = len(wanted) + symbols
    model = _load(train_on_lines([line], tmp_path / "out", needed, model_type="char", **options))
    assert {model.id_to_piece(i) for i in range(symbols, model.get_piece_size())} == wanted
    with pytest.raises(TokenizerError, match=rf"the characters and symbols alone need {needed}\."):
        train_on_lines([line], tmp_path / "few", needed - 1, model_type="char", **options)


def test_byte_fallback_spells_what_was_never_seen(tmp_path):
    text = _text(tmp_path / "text.txt")
    plain = _load(train_tokenizer([text], tmp_path / "plain", 60))
    spelled = _load(train_tokenizer([text], tmp_path / "bytes", 320, byte_fallback=True))
    assert 0 in plain.encode("señor ß")
    assert 0 not in spelled.encode("señor ß")
    assert spelled.decode(spelled.encode("señor ß")) == "señor ß"


def test_manifests_and_texts_together(tmp_path):
    manifest = tmp_path / "m.json"
    manifest.write_text('{"audio_filepath": "a.wav", "text": "ñandú está"}\n\n{"text": ""}\n', encoding="utf-8")
    text = _text(tmp_path / "text.txt")
    assert list(read_lines(manifest)) == ["ñandú está"]
    model = _load(train_tokenizer([text, manifest], tmp_path / "out", 60))
    assert 0 not in model.encode("ñandú está")


@pytest.mark.parametrize("name", ["text.txt", "m.json"])
def test_a_line_that_is_not_utf_8_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"{name}:2: not UTF-8 \(byte 0xe9\)"):
        train_tokenizer([tmp_path / name], tmp_path / "out", 30)


@pytest.mark.parametrize("row", ['{"audio_filepath": "a.wav"}', '{"text": null}', '["text"]', "not json"])
def test_a_bad_manifest_row_is_named(tmp_path, row):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(f'{{"text": "good"}}\n{row}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: expected a JSON object with a string `text`"):
        train_tokenizer([manifest], tmp_path / "out", 30)


def test_no_text_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="files are empty"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "out", 30)
    with pytest.raises(ValueError, match="'word': expected one of unigram, bpe, char"):
        train_tokenizer([_text(tmp_path / "text.txt")], tmp_path / "out", 30, model_type="word")


def test_no_long_line_is_lost_in_silence(tmp_path):
    """SentencePiece drops lines above 4192 bytes by default: a letter that is in such a line only must get a piece."""
    text = _text(tmp_path / "text.txt")
    with text.open("a", encoding="utf-8") as file:
        file.write("ω " * 3000 + "\n")
    assert 0 not in _load(train_tokenizer([text], tmp_path / "out", 60)).encode("ω")
    with text.open("a", encoding="utf-8") as file:
        file.write("a " * (1 << 20) + "\n")
    with pytest.raises(ValueError, match=r"text\.txt:302: longer than"):
        train_tokenizer([text], tmp_path / "out", 60)


@pytest.fixture
def corpus(tmp_path) -> Path:
    """What `ensure_tokenizer` reads of a corpus: much English text, few transcripts with letters of their own."""
    root = tmp_path / "corpus"
    _text(root / "text" / "train.txt", lines=2000)
    rows = [{"text": "où êtes vous s'il vous plaît"}, {"text": "où est le numéro"}]
    (root / "manifests").mkdir()
    (root / "manifests" / "speech_train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_ensure_tokenizer_trains_once_and_gives_transcripts_their_weight(corpus):
    out = ensure_tokenizer(corpus, 70)
    assert out == corpus / "tokenizers" / "spm_70"
    model = _load(out)
    assert 0 not in model.encode("où êtes vous s'il vous plaît")
    plain = train_tokenizer(
        [corpus / "text" / "train.txt", corpus / "manifests" / "speech_train.json"], corpus / "p", 70
    )
    transcript = "où est le numéro"
    assert len(model.encode(transcript)) < len(_load(plain).encode(transcript)) == len(transcript) + 1  # by letters
    before = (out / "tokenizer.model").stat().st_mtime_ns
    assert ensure_tokenizer(corpus, 70) == out
    assert (out / "tokenizer.model").stat().st_mtime_ns == before
    (out / "tokenizer.model").unlink()  # a training killed before its last file
    assert _load(ensure_tokenizer(corpus, 70)).get_piece_size() == 70


def test_ensure_tokenizer_of_a_small_corpus(corpus):
    assert 40 < _load(ensure_tokenizer(corpus, 32000)).get_piece_size() < 32000
    with pytest.raises(TokenizerError, match="at most"):
        ensure_tokenizer(corpus, 31000, allow_smaller=False)


def test_ensure_tokenizer_needs_a_prepared_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.py"):
        ensure_tokenizer(tmp_path / "nothing", 64)
    assert not (tmp_path / "nothing").exists()


def _ensure(root: Path, start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    _load(ensure_tokenizer(root, 64))


def test_processes_that_ask_at_once_get_one_tokenizer(corpus):
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    start = time.time() + 1.5
    processes = [context.Process(target=_ensure, args=(corpus, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(path.name for path in (corpus / "tokenizers" / "spm_64").iterdir()) == sorted(FILES)


def test_command_line(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"
    text = _text(tmp_path / "text.txt", lines=40)
    command = [sys.executable, script, "--text", text, "--out", tmp_path / "out", "--vocab-size", "5000"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "this text carries at most" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = subprocess.run([*command, "--allow-smaller"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "pieces only, not 5000" in done.stderr
    assert (tmp_path / "out" / "vocab.txt").exists()
