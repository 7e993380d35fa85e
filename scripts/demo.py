"""The whole story on human speech, in minutes on a CPU: pre-train, kill, resume, stage 2, fine-tune, transcribe.

    python scripts/demo.py [--exp-dir runs/demo] [--data-root data/prompts]

Every step is one of the project's own commands, printed before it runs. Running it again resumes what is not finished.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
KILL_AFTER_SAVES = 1
SHOWN = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--exp-dir", type=Path, default=Path("runs/demo"), help="run folders go here; default: %(default)s"
    )
    parser.add_argument("--data-root", type=Path, default=Path("data/prompts"), help="default: %(default)s")
    parser.add_argument("--stage1-steps", type=int, default=700, help="default: %(default)s")
    parser.add_argument("--stage2-steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--finetune-steps", type=int, default=1200, help="default: %(default)s")
    return parser.parse_args()


def say(title: str) -> None:
    print(f"\n{'=' * 100}\n{title}\n{'=' * 100}", flush=True)


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *map(str, arguments)]


def run(script: str, *arguments: object) -> None:
    """Run a script and stop the demo if it fails."""
    print("$ python", shlex.join(["scripts/" + script, *map(str, arguments)]), flush=True)
    status = subprocess.run(command(script, *arguments), check=False).returncode
    if status:
        sys.exit(f"demo: {script} ended with status {status}; mend what it says above and run the demo again")


def run_and_kill(script: str, checkpoints: Path, *arguments: object) -> None:
    """Run a script until it has saved, then kill it without notice (SIGKILL), as a lost machine would."""
    print("$ python", shlex.join(["scripts/" + script, *map(str, arguments)]), flush=True)
    process = subprocess.Popen(command(script, *arguments))
    while process.poll() is None and len(list(checkpoints.glob("*.ckpt"))) < KILL_AFTER_SAVES:
        time.sleep(0.2)
    time.sleep(5)  # some steps past the checkpoint, to be repeated
    process.kill()
    process.wait()
    print("killed (SIGKILL); the same command again:", flush=True)


def show_transcripts(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    print(f"{len(lines)} utterances; the first {SHOWN}:")
    for line in lines[:SHOWN]:
        print(f"  {'reference':>10}: {line['text']}\n  {'heard':>10}: {line['pred_text']}\n")


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    folder = options.exp_dir
    common = ["model=tiny", f"exp_manager.exp_dir={folder}", f"data.root={options.data_root}"]
    stage1, stage2, recogniser = (folder / n / f"{n}.nemo" for n in ("slam_stage1", "slam_stage2", "asr_ctc"))
    test = options.data_root / "manifests" / "es_test.json"

    say("1. Human speech: telephone prompts in English, Spanish and French, and public-domain text")
    run("prepare_data.py", "prompts", "--root", options.data_root)

    say("2. Stage 1: masked speech and masked text in one encoder; killed on the way")
    arguments = ["--config-name", "slam_stage1", *common, f"trainer.max_steps={options.stage1_steps}"]
    checkpoints = stage1.parent / "checkpoints"
    if not list(checkpoints.glob("*.ckpt")):
        run_and_kill("speech_pretrain.py", checkpoints, *arguments)
    run("speech_pretrain.py", *arguments)

    say("3. Stage 2: adds translation language modelling and speech-text matching on transcribed speech")
    weights = [f"model.objectives.{name}.weight=0.3" for name in ("translation_lm", "matching")]
    steps = f"trainer.max_steps={options.stage2_steps}"
    run("speech_pretrain.py", "--config-name", "slam_stage2", *common, *weights, steps, f"init_from={stage1}")

    say("4. Spanish speech recognition: a stock NeMo CTC model around the pre-trained encoder")
    steps = f"trainer.max_steps={options.finetune_steps}"
    run("speech_finetune.py", "--config-name", "asr_ctc", *common, "data.language=es", steps, f"init_from={stage2}")

    say("5. Transcripts of test prompts, which no stage has seen")
    out = folder / "es_test.jsonl"
    run("transcribe.py", recogniser, test, "--out", out)
    show_transcripts(out)
    run("evaluate.py", out)

    say("6. A report to look at: curves, health, examples, transcripts with their errors marked")
    report = folder / "report.html"
    run("report.py", stage1.parent, stage2.parent, recogniser.parent, "--transcripts", out, "--out", report)

    print(f"\ndemo: {(time.perf_counter() - started) / 60:.1f} min; run folders and transcripts are in {folder}")
    print(f"demo: open {report} in a browser")


if __name__ == "__main__":
    main()
