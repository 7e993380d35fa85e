"""Makes a stock NeMo ASR model of a pre-trained encoder, for NeMo's own fine-tuning scripts; or ONNX.

    python scripts/export_nemo.py runs/slam_stage2/slam_stage2.nemo ctc.nemo --to ctc --tokenizer SPM_DIR
    python scripts/export_nemo.py runs/slam_stage2/slam_stage2.nemo encoder.onnx --to onnx-encoder
    python scripts/export_nemo.py runs/asr_ctc/asr_ctc.nemo ctc.onnx --to onnx-ctc

The decoder of ctc.nemo is untrained. Such a file is restored after `import nemo_slam`, or by any script that
`python -m nemo_slam.runner SCRIPT.py ...` runs. ONNX takes log-mel frames (audio_signal, length) of the model's
preprocessor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .nemo of speech_pretrain.py; for ONNX, of speech_finetune.py too")
    parser.add_argument("out", type=Path, help="the .nemo or .onnx to write")
    parser.add_argument("--to", choices=("ctc", "onnx-encoder", "onnx-ctc"), default="ctc", help="default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, help="for ctc: a folder of scripts/train_tokenizer.py")
    options = parser.parse_args(arguments)
    if options.to == "ctc" and options.tokenizer is None:
        parser.error("--to ctc needs --tokenizer")
    return options


def main() -> int:
    options = parse_arguments()
    try:
        if options.to.startswith("onnx-"):
            from nemo_slam.export_onnx import export_onnx

            export_onnx(options.source, options.to.removeprefix("onnx-"), options.out)
        else:
            from nemo_slam.export import export_nemo

            print(export_nemo(options.source, options.to, options.tokenizer, options.out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
