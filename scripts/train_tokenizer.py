"""Trains a SentencePiece tokenizer that NeMo's BPE models read (`model.tokenizer.dir=OUT model.tokenizer.type=bpe`).

    python scripts/train_tokenizer.py --text data/prompts/text/train.txt \\
        --manifests data/prompts/manifests/speech_train.json --vocab-size 256 --out data/tokenizers/spm_256
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text, a sentence a line")
    parser.add_argument("--manifests", nargs="+", type=Path, default=[], metavar="FILE", help="NeMo manifests")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of pieces, symbols included")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.model and vocab files")
    parser.add_argument("--model-type", choices=("unigram", "bpe", "char"), default="unigram")
    parser.add_argument(
        "--allow-smaller", action="store_true", help="train the largest vocabulary the text carries if it is too small"
    )
    parser.add_argument("--byte-fallback", action="store_true", help="spell unseen characters in bytes, not <unk>")
    parser.add_argument("--character-coverage", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--sequence-symbols", action="store_true", help="add <s>, </s> and <pad> (attention decoders)")
    options = parser.parse_args(arguments)
    if not options.text and not options.manifests:
        parser.error("give --text or --manifests")
    return options


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from nemo_slam.data.tokenizer import train_tokenizer

    try:
        out = train_tokenizer(
            [*options.text, *options.manifests],
            options.out,
            options.vocab_size,
            model_type=options.model_type,
            allow_smaller=options.allow_smaller,
            byte_fallback=options.byte_fallback,
            character_coverage=options.character_coverage,
            sequence_symbols=options.sequence_symbols,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"ready: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
