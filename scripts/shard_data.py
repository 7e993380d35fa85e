"""Shards for training on many machines: NeMo tarred audio with offset indexes, token files for text, lhotse Shar.

    python scripts/shard_data.py audio MANIFEST [MANIFEST ...] --out DIR --shards 512 --workers 16
    python scripts/shard_data.py text TEXT [TEXT ...] --tokenizer tokenizer.model --max-tokens 512 --workers 16
    python scripts/shard_data.py verify DIR
    python scripts/shard_data.py shar SHAR --out DIR   # manifests for a lhotse Shar; its audio stays where it is

Killed at any moment, the same command goes on with what is missing, and the files are those of an unbroken run.
`verify` reads everything again and names every file that is missing, cut or changed; DIR is that of the tar files, or
the index folder that `text` prints.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    audio = commands.add_parser("audio", help="manifests to tar files")
    audio.add_argument("manifests", nargs="+", type=Path, metavar="MANIFEST")
    audio.add_argument("--out", type=Path, required=True, help="folder for the shards")
    audio.add_argument("--shards", type=int, required=True, help="number of tar files; at least one a loading process")
    audio.add_argument("--seed", type=int, default=0, help="of the order; default: %(default)s")
    audio.add_argument("--keep-order", action="store_true", help="the manifests' order instead")
    audio.add_argument("--min-duration", type=float, default=0.0, help="in seconds; default: %(default)s")
    audio.add_argument("--max-duration", type=float, default=float("inf"), help="in seconds; default: no limit")
    audio.add_argument("--codec", choices=("keep", "flac"), default="keep", help="default: the files as they are")
    text = commands.add_parser("text", help="text to an index with a token file, beside the text or in --cache-dir")
    text.add_argument("texts", nargs="+", metavar="TEXT", help="as in data.train_ds.text.text_filepath")
    text.add_argument("--tokenizer", type=Path, required=True)
    text.add_argument("--max-tokens", type=int, required=True, help="data.train_ds.text.max_tokens")
    text.add_argument("--min-tokens", type=int, default=1, help="data.train_ds.text.min_tokens; default: %(default)s")
    text.add_argument("--cache-dir", help="data.train_ds.text.cache_dir; default: beside the text")
    text.add_argument("--work", type=Path, help="folder for what is half done; default: beside the index")
    shar = commands.add_parser("shar", help="manifests for a lhotse Shar, whose audio is read where it lies")
    shar.add_argument("source", metavar="SHAR", help="its folder, or URL (s3://...) if fsspec's driver is installed")
    shar.add_argument("--out", type=Path, required=True, help="folder for the manifests")
    for command in (audio, text):
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; default: %(default)s")
    verify = commands.add_parser("verify", help="check what was made")
    verify.add_argument("folder", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    if getattr(options, "workers", 1) < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    return options


def make_audio(options: argparse.Namespace) -> int:
    from nemo_slam.data.sharding import ShardSettings, make_shards

    seed = None if options.keep_order else options.seed
    settings = ShardSettings(options.shards, seed, options.min_duration, options.max_duration, options.codec)
    corpus = make_shards(options.manifests, options.out, settings, options.workers)
    print(
        f"ready: {options.out}: {corpus['rows']:,} rows, {corpus['hours']:.2f} h in {settings.shards} shards; "
        f"{corpus['filtered']:,} outside the duration limits, {len(corpus['bad']):,} bad, listed in shards.json"
    )
    return 0


def make_text(options: argparse.Namespace) -> int:
    from nemo_slam.data.config import TextConfig
    from nemo_slam.data.manifest import expand_paths
    from nemo_slam.data.token_shards import make_token_files

    config = TextConfig(options.texts, 1, options.max_tokens, options.min_tokens, cache_dir=options.cache_dir)
    work = options.work or Path(options.cache_dir or expand_paths(options.texts)[0].parent) / ".token_pieces"
    index = make_token_files(config, options.tokenizer, work, options.workers)
    total = index.meta["total_length"]
    print(f"ready: {index.folder}: {len(index):,} examples, {total:,} tokens, {index.meta['bad']:,} bad lines")
    return 0


def make_shar(options: argparse.Namespace) -> int:
    from nemo_slam.data.shar import shar_manifests

    made = shar_manifests(options.source, options.out)
    print(
        f"ready: {made['rows']:,} rows, {made['hours']:.2f} h; {made['without_audio']:,} cuts have no audio. To train:"
    )
    print(f"  data.train_ds.speech.manifest_filepath={made['manifests']}")
    print(f"  data.train_ds.speech.tarred_audio_filepaths={made['tars']}")
    return 0


def verify(options: argparse.Namespace) -> int:
    from nemo_slam.data import sharding
    from nemo_slam.data.shard_files import CHECKSUMS, damaged_beside

    is_index = (options.folder / CHECKSUMS).is_file()
    problems = (damaged_beside if is_index else sharding.verify)(options.folder)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(
            f"error: {len(problems)} problem(s): delete the files that are named, and make them again",
            file=sys.stderr,
        )
        return 1
    print(f"all of {options.folder} is as it was written")
    return 0


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from nemo_slam.data.bad_rows import DataError
    from nemo_slam.data.remote import RemoteError

    started = time.monotonic()
    try:
        status = {"audio": make_audio, "text": make_text, "shar": make_shar, "verify": verify}[options.command](options)
    except (DataError, RemoteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"({time.monotonic() - started:.1f} s)")
    return status


if __name__ == "__main__":
    sys.exit(main())
