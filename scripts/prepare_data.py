"""Prepares a corpus: audio, manifests and text in the layout of docs/data.md.

    python scripts/prepare_data.py prompts            # human-read telephone prompts, en/es/fr, from Debian packages
    python scripts/prepare_data.py mini_librispeech   # through lhotse; needs internet
    python scripts/prepare_data.py synthetic          # eSpeak NG reading text; marked as synthetic everywhere
    python scripts/prepare_data.py librispeech --source /data/LibriSpeech   # and libri_light, librispeech_lm, mc4,
                                                                            # covost2: from folders that are here
    python scripts/prepare_data.py lhotse --recordings R.jsonl.gz --supervisions S.jsonl.gz   # what lhotse prepared
    python scripts/prepare_data.py oracle_language    # chords for words, to prove cross-modal learning

Calling it again returns at once; a killed preparation starts over and trusts nothing half-written.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        corpus = corpora.add_parser(name, help=text, description=text)
        corpus.add_argument("--root", type=Path, default=Path("data", name), help="default: %(default)s")
        return corpus

    prompts = add("prompts", "human-read prompts and public-domain text from Debian packages, without root")
    librispeech = add("mini_librispeech", "5 + 2 hours of English audiobooks through lhotse")
    librispeech.add_argument("--source", type=Path, help="LibriSpeech folder that is here already; else downloaded")
    synthetic = add("synthetic", "sentences read by eSpeak NG in several voices")
    synthetic.add_argument("--sentences", type=int, help="how many are read in every language; default: 300")
    oracle = add("oracle_language", "an artificial language of chords, for the proof of cross-modal learning")
    oracle.add_argument("--sequences", type=int, help="how many; default: 8000")
    for corpus in (prompts, synthetic):
        corpus.add_argument("--languages", nargs="+", choices=("en", "es", "fr"), help="default: all three")

    here = {
        "librispeech": add("librispeech", "LibriSpeech, 960 hours: the folder of OpenSLR 12"),
        "libri_light": add("libri_light", "Libri-light: the folder with small, medium or large"),
        "librispeech_lm": add("librispeech_lm", "text: librispeech-lm-norm.txt.gz of OpenSLR 11, or its folder"),
        "mc4": add("mc4", "text: a folder of mC4's JSON-lines"),
        "covost2": add("covost2", "CoVoST 2: Common Voice 4.0 with a folder a language, and covost_v2.en_de.tsv, ..."),
    }
    for corpus in here.values():
        corpus.add_argument("--source", type=Path, required=True, help="what is here already")
    here["libri_light"].add_argument("--max-seconds", type=float, help="of a row; default: 30")
    here["covost2"].add_argument("--translations", type=Path, help="folder of covost_v2.*.tsv; default: --source")
    here["covost2"].add_argument("--pairs", nargs="+", help="as en_de; default: the paper's, en_de en_ca en_ar en_tr")
    lhotse = add("lhotse", "a part of any corpus that `lhotse prepare` has written")
    lhotse.add_argument("--recordings", type=Path, required=True, help="*_recordings_*.jsonl.gz")
    lhotse.add_argument("--supervisions", type=Path, required=True, help="*_supervisions_*.jsonl.gz")
    lhotse.add_argument("--part", default="train", help="names the manifest; default: %(default)s")
    lhotse.add_argument("--lang", help="the rows' language; default: the supervisions' own")
    lhotse.add_argument("--lower", action="store_true", help="write the texts in lower case")
    parser.epilog = "\n".join(corpus.format_usage().removeprefix("usage: ") for corpus in corpora.choices.values())
    return parser.parse_args(arguments)


def main() -> int:
    options = vars(parse_arguments())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from nemo_slam.data.corpora import prepare
    from nemo_slam.data.corpora.files import CorpusError

    started = time.monotonic()
    try:
        root = prepare(options.pop("corpus"), options.pop("root"), **options)
    except (CorpusError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"ready: {root} ({time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
