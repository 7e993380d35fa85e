"""Runs a stock NeMo script with nemo_slam's classes registered.

    python -m nemo_slam.runner transcribe_speech.py model_path=asr_ctc.nemo audio_dir=prompts output_filename=out.json

A script that never imports nemo_slam cannot restore a ``.nemo`` with our encoder: NeMo refuses classes that it does not
know. On several GPUs: ``torchrun -m --nproc-per-node N nemo_slam.runner ...``; Lightning, left to start the other
processes itself, starts the script alone.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import nemo_slam  # noqa: F401  registers our classes with NeMo, once the script imports that


def main(arguments: list[str]) -> int:
    """Run the script that the first argument names, as if Python had been called with it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip() if arguments else "usage: python -m nemo_slam.runner SCRIPT.py [ARGUMENT ...]")
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"nemo_slam.runner: {script} is not a file", file=sys.stderr)
        return 2
    sys.argv = [str(script), *arguments[1:]]
    sys.path[0] = str(script.resolve().parent)  # where Python looks first when it runs a script
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
