"""Transcribes, translates or classifies with a fine-tuned model: one JSON line an utterance or text.

    python scripts/transcribe.py runs/asr_ctc/asr_ctc.nemo prompt.wav recordings/
    python scripts/transcribe.py runs/asr_ctc/asr_ctc.nemo data/prompts/manifests/es_test.json --out es_test.jsonl

Inputs are audio files, folders of them, and NeMo manifests; for models of mt and text_classification JSON-lines with
their texts, or text files. A file that cannot be read is named on standard error and left out; the others are done, and
the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .nemo of scripts/speech_finetune.py")
    parser.add_argument("inputs", nargs="+", type=Path, help="audio files, folders, NeMo manifests (.json, .jsonl)")
    parser.add_argument("--out", type=Path, help="file to write instead of standard output")
    parser.add_argument("--batch-size", type=int, default=8, help="utterances in a forward pass; default: %(default)s")
    parser.add_argument(
        "--chunk-seconds", type=float, default=30.0, help="longer audio is cut at quiet places; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or options.chunk_seconds < 1:
        parser.error("--batch-size and --chunk-seconds must be at least 1")
    if options.out is not None and options.out.exists():
        for path in (options.model, *options.inputs):
            if path.exists() and path.samefile(options.out):
                parser.error(f"--out {options.out} is an input too, and would be emptied before it is read")
    return options


def main() -> int:
    options = parse_arguments()
    from nemo_slam.evaluation.transcription import answers, restore, write_line

    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for transcripts alone
            from nemo.utils import logging as nemo_logging

            nemo_logging.setLevel(logging.ERROR)
            model = restore(options.model)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    done = failed = 0
    with contextlib.ExitStack() as files:
        out = sys.stdout
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            out = files.enter_context(open(options.out, "w", encoding="utf-8"))
        for item in answers(model, options.inputs, options.batch_size, options.chunk_seconds):
            if item.problem is not None:
                failed += 1
                print(f"error: {item.problem}", file=sys.stderr)
                continue
            done += 1
            print(write_line(item), file=out, flush=True)
    print(f"{done} done, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
