"""Scores transcripts: WER and CER (jiwer), BLEU and chrF (sacrebleu), accuracy, with bootstrap intervals, by language
and corpus too; or probes an encoder.

python scripts/evaluate.py es_test.jsonl                                    # what scripts/transcribe.py wrote
python scripts/evaluate.py runs/asr_ctc/asr_ctc.nemo data/prompts/manifests/es_test.json
python scripts/evaluate.py st.jsonl --reference translation --metrics bleu chrf
python scripts/evaluate.py scratch.jsonl --against pretrained.jsonl         # paired difference
python scripts/evaluate.py runs/slam_stage2/slam_stage2.nemo data/prompts/manifests/es_test.json --probes

With a model, what cannot be read is named on standard error and not scored; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    from nemo_slam.evaluation.text_metrics import METRICS, NORMALISATIONS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help="TRANSCRIPTS.jsonl, or MODEL.nemo and a manifest")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=["wer", "cer"], help="default: wer cer")
    parser.add_argument("--reference", default="text", help="key of the reference: text (default), or translation")
    how = "; ".join(f"{name}: {what}" for name, what in NORMALISATIONS.items())
    parser.add_argument("--normalise", choices=NORMALISATIONS, default="basic", help=f"default: basic. {how}")
    parser.add_argument("--by", nargs="+", default=["lang", "corpus"], help="keys to group by; default: lang corpus")
    parser.add_argument("--against", type=Path, help="other transcripts of the same audio: print theirs minus ours")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the scores")
    parser.add_argument("--batch-size", type=int, default=8, help="with a model; default: %(default)s")
    parser.add_argument(
        "--probes",
        action="store_true",
        help="with a model: the effective rank of its encoder's output; with one of pre-training its other probes too",
    )
    options = parser.parse_args(arguments)
    if options.probes and options.inputs[0].suffix != ".nemo":
        parser.error("--probes needs a .nemo and manifests")
    if options.inputs[0].suffix == ".nemo" and len(options.inputs) < 2:
        parser.error("a model needs a manifest to transcribe")
    if options.inputs[0].suffix != ".nemo" and len(options.inputs) != 1:
        parser.error("give one file of transcripts, or a .nemo and manifests")
    return options


def transcripts(inputs: list[Path], batch_size: int, reference: str) -> tuple[list[dict[str, Any]], int]:
    """The rows to score, and how many have no transcript: audio that cannot be read is named, and not scored."""
    from nemo_slam.evaluation.scoring import check_reference, read_transcripts

    if inputs[0].suffix != ".nemo":
        return read_transcripts(inputs[0]), 0
    from nemo_slam.evaluation.transcription import answers, questions, restore

    model, rows, failed = restore(inputs[0]), [], 0
    for item in questions(model, inputs[1:]):  # now, and not when hours of audio are transcribed
        if item.problem is None and (item.row or item.path.is_file()):
            check_reference(item.row, reference, item.source)
    for item in answers(model, inputs[1:], batch_size):
        if item.problem is not None:
            failed += 1
            print(f"not scored: {item.problem}", file=sys.stderr)
        else:
            rows.append(item.row)
    return rows, failed


def probes(arguments: argparse.Namespace) -> int:
    """Print (and write) the probes of the first input on the others."""
    from nemo_slam.evaluation.probing import probe_model

    try:
        figures = probe_model(arguments.inputs[0], arguments.inputs[1:])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in figures.items():
        print(f"{name:<40} {value:.4f}")
    write(arguments.out, figures)
    return 0


def write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    arguments = parse_arguments()
    if arguments.probes:
        return probes(arguments)
    from nemo_slam.evaluation.scoring import Options, check_references, compare, read_transcripts, score, table

    options = Options(
        tuple(arguments.metrics),
        arguments.reference,
        arguments.normalise,
        tuple(arguments.by),
        arguments.resamples,
        arguments.seed,
    )
    try:
        others = [] if arguments.against is None else read_transcripts(arguments.against)
        check_references(others, options, str(arguments.against))
        rows, failed = transcripts(arguments.inputs, arguments.batch_size, arguments.reference)
        if not rows:
            raise ValueError(f"nothing to score in {', '.join(map(str, arguments.inputs))}")
        check_references(rows, options, str(arguments.inputs[-1]))
        result = score(rows, options)
        if arguments.against is not None:
            result["difference"] = compare(rows, others, options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    for metric, d in result.get("difference", {}).items():
        clear = "clear of zero" if d["low"] > 0 or d["high"] < 0 else "not clear of zero"
        interval = f"{d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
        print(f"{metric.upper()} of {arguments.against} minus this: {interval}, {clear} ({d['utterances']} utterances)")
    write(arguments.out, result)
    if failed:
        print(f"{failed} of {failed + len(rows)} have no transcript and are in no score", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
