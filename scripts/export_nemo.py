"""Makes a stock NeMo ASR model of a pre-trained encoder, for NeMo's own fine-tuning scripts.

    python scripts/export_nemo.py runs/slam_stage2/slam_stage2.nemo --to ctc --tokenizer SPM_DIR ctc.nemo

The decoder is untrained. Such a file is restored after `import nemo_slam`, or by any script that
`python -m nemo_slam.runner SCRIPT.py ...` runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .nemo of scripts/speech_pretrain.py")
    parser.add_argument("out", type=Path, help="the .nemo to write")
    parser.add_argument("--to", choices=["ctc"], default="ctc", help="kind of model; default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder of scripts/train_tokenizer.py")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    from nemo_slam.export import export_nemo

    try:
        print(export_nemo(options.source, options.to, options.tokenizer, options.out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
