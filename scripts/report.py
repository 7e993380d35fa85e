"""Makes a report of one or more runs: a single HTML file, with all that it shows inside.

    python scripts/report.py runs/slam_stage1_tiny
    python scripts/report.py runs/first runs/second runs/asr_ctc --transcripts es_test.jsonl --translations st.jsonl

Start it where the runs were started: their configs name data by relative paths. It may be made while a run goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, overlaid in this order")
    parser.add_argument("--out", type=Path, help="default: report.html in the run folder, or beside several")
    parser.add_argument(
        "--transcripts", nargs="+", type=Path, default=[], metavar="JSONL", help="of scripts/transcribe.py"
    )
    parser.add_argument(
        "--translations",
        nargs="+",
        type=Path,
        default=[],
        metavar="JSONL",
        help="the same, compared with the key translation",
    )
    parser.add_argument(
        "--without-model", action="store_true", help="no examples: the model need not fit here; a second, not twenty"
    )
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if not options.without_model:
        warnings.filterwarnings("ignore")  # of libraries that NeMo imports
        logging.disable(logging.WARNING)
    from nemo_slam.evaluation.report.make import default_path, make

    if not options.without_model:
        from nemo.utils import logging as nemo_logging

        nemo_logging.setLevel(logging.ERROR)
    out = options.out or default_path(options.runs)
    try:
        runs = make(options.runs, out, options.transcripts, options.translations, not options.without_model)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from nemo_slam.evaluation.report.health import judge

    for run in runs:
        print(f"{run.label}: {judge(run).summary}")
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
