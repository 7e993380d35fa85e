"""Trains SentencePiece tokenizers in the folder layout that NeMo's BPE models read (`tokenizer.dir`, `type: bpe`).

The same inputs give the same bytes: no file name, time or thread count enters the model file.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nemo_slam.data.corpora.files import locked, whole_file, write_text

logger = logging.getLogger("nemo_slam.data")

MODEL_TYPES = ("unigram", "bpe", "char")
_THREADS = 2  # fixed: sums over threads round differently with another number
_MAX_LINE_BYTES = 1 << 20  # SentencePiece drops longer lines without a word; its default is 4192
_SPACE = "▁"  # as SentencePiece writes it
_NORMALISATION = "nmt_nfkc"  # SentencePiece's default
_NEMO_SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")  # what NeMo leaves out of vocab.txt


_TOO_FEW = (
    "vocabulary of {} pieces: the characters and symbols alone need {}. Ask for that many or more, or lower the "
    "character coverage."
)


class TokenizerError(ValueError):
    """The text cannot carry the tokenizer asked for; the message names the sizes that it can."""


def train_tokenizer(files: Iterable[str | Path], out_dir: str | Path, vocab_size: int, **options) -> Path:
    """Trains a tokenizer on ``files`` and writes `tokenizer.model`, `tokenizer.vocab` and `vocab.txt`.

    Args:
        files: text files, one sentence a line, or NeMo manifests (`.json`, `.jsonl`), of which `text` is read.
        out_dir: folder to write to; files of an earlier training are replaced.
        vocab_size: number of pieces, `<unk>` and the other symbols included.
        options: those of `train_on_lines`.

    Returns:
        ``out_dir``.

    Raises:
        TokenizerError: ``vocab_size`` is too large or too small for the text; the message names the limit.
        ValueError: no text, or a manifest row without text.
    """
    return train_on_lines((line for file in files for line in read_lines(Path(file))), out_dir, vocab_size, **options)


def ensure_tokenizer(root: str | Path, vocab_size: int, allow_smaller: bool = True) -> Path:
    """Tokenizer folder of a prepared corpus, trained on first use; safe if several processes call it at once.

    It is trained on ROOT/text/train.txt and the training transcripts of all languages. The transcripts are repeated
    until they weigh as much as the text, so that a language the text lacks gets pieces of its own.

    Args:
        root: folder of a prepared corpus.
        vocab_size: number of pieces; a corpus too small for it gives fewer if ``allow_smaller``.

    Returns:
        ROOT/tokenizers/spm_<vocab_size>.

    Raises:
        FileNotFoundError: ``root`` holds no prepared corpus.
        TokenizerError: see `train_tokenizer`.
    """
    root = Path(root)
    out_dir = root / "tokenizers" / f"spm_{vocab_size}"
    if (out_dir / "tokenizer.model").is_file():  # written last
        return out_dir
    sources = [root / "text" / "train.txt", root / "manifests" / "speech_train.json"]
    for source in sources:
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no prepared corpus in {root}; run scripts/prepare_data.py first")
    with locked(root / "tokenizers", f"spm_{vocab_size}"):
        if not (out_dir / "tokenizer.model").is_file():
            text, transcripts = (list(read_lines(source)) for source in sources)
            repeats = max(1, round(sum(map(len, text)) / max(1, sum(map(len, transcripts)))))
            logger.info("training a tokenizer of %d pieces in %s", vocab_size, out_dir)
            train_on_lines(text + transcripts * repeats, out_dir, vocab_size, allow_smaller=allow_smaller)
    return out_dir


def read_lines(file: Path) -> Iterator[str]:
    """Yields the sentences of a text file, or the `text` of a manifest's rows. Empty ones are skipped."""
    is_manifest = file.suffix in (".json", ".jsonl")
    with file.open("rb") as rows:
        for number, row in enumerate(rows, 1):
            try:
                text = row.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}:{number}: not UTF-8 (byte 0x{row[error.start]:02x})") from None
            if not text:
                continue
            if is_manifest:
                try:
                    text = json.loads(text)["text"].strip()
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{file}:{number}: expected a JSON object with a string `text`") from error
            if len(text.encode()) > _MAX_LINE_BYTES:
                raise ValueError(f"{file}:{number}: longer than {_MAX_LINE_BYTES} bytes; write one sentence a line")
            if text:
                yield text


def train_on_lines(
    lines: Iterable[str],
    out_dir: str | Path,
    vocab_size: int,
    *,
    model_type: str = "unigram",
    allow_smaller: bool = False,
    byte_fallback: bool = False,
    character_coverage: float = 1.0,
    sequence_symbols: bool = False,
) -> Path:
    """As `train_tokenizer`, on sentences.

    Args:
        lines: sentences, in any order that is the same every time.
        out_dir: folder to write to.
        vocab_size: number of pieces.
        model_type: `unigram`, `bpe`, or `char`: each character alone, as many as there are.
        allow_smaller: if the text cannot carry ``vocab_size`` pieces, train the largest tokenizer it can, and say so.
        byte_fallback: spell unseen characters in 256 byte pieces instead of `<unk>`.
        character_coverage: share of the text's characters that get a piece of their own.
        sequence_symbols: add `<s>`, `</s>` and `<pad>`, which attention decoders need and CTC and RNN-T do not.
    """
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise ValueError(f"model type {model_type!r}: expected one of {', '.join(MODEL_TYPES)}")
    out_dir = Path(out_dir)
    lines = list(lines)  # SentencePiece holds them all too, and would bury an error that reading them raises
    if not lines:
        raise ValueError("no text to train a tokenizer on: the files are empty")
    if model_type == "char" and character_coverage == 1.0:
        symbols = (4 if sequence_symbols else 1) + (256 if byte_fallback else 0)
        _check_characters(lines, vocab_size, symbols)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name=_NORMALISATION,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            hard_vocab_limit=not allow_smaller,
            unk_id=0,
            bos_id=1 if sequence_symbols else -1,
            eos_id=2 if sequence_symbols else -1,
            pad_id=3 if sequence_symbols else -1,
            num_threads=_THREADS,
            max_sentence_length=_MAX_LINE_BYTES,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = processor.get_piece_size()
    if size < vocab_size:
        logger.warning("the text carries %d pieces only, not %d: this tokenizer has %d", size, vocab_size, size)
    pieces = [processor.id_to_piece(number) for number in range(size)]
    scores = [processor.get_score(number) for number in range(size)]
    write_text(out_dir / "tokenizer.vocab", "".join(f"{p}\t{s:g}\n" for p, s in zip(pieces, scores, strict=True)))
    write_text(out_dir / "vocab.txt", "".join(f"{_nemo_token(p)}\n" for p in pieces if p not in _NEMO_SPECIAL))
    with whole_file(out_dir / "tokenizer.model") as temporary:
        temporary.write_bytes(model.getvalue())
    return out_dir


def _check_characters(lines: Sequence[str], vocab_size: int, symbols: int) -> None:
    """SentencePiece would leave out the rarest characters without a word. Counted are those after its normalisation,
    which may be more than before (a ligature is two) or fewer (a letter and its accent are one).

    Raises:
        TokenizerError: ``vocab_size`` is too small for the characters, of which the space is one.
    """
    import sentencepiece

    normalised = sentencepiece.SentencePieceNormalizer(rule_name=_NORMALISATION).normalize(list(lines))
    needed = symbols + len({character for line in normalised for character in line} | {_SPACE})
    if vocab_size < needed:
        raise TokenizerError(_TOO_FEW.format(vocab_size, needed))


def _nemo_token(piece: str) -> str:
    """A piece as NeMo's vocab.txt has it: the inner pieces of a word are marked, not its first."""
    if not piece.startswith("▁"):
        return f"##{piece}"
    return piece[1:] or piece


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    message = str(error)
    if match := re.search(r"too high .*?<= (\d+)", message):
        return TokenizerError(
            f"vocabulary of {vocab_size} pieces: this text carries at most {match[1]}. Ask for no more, give more "
            "text, or allow a smaller vocabulary (--allow-smaller, allow_smaller=True)."
        )
    if match := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return TokenizerError(_TOO_FEW.format(vocab_size, match[2]))
    return error
