"""The whole story on human speech, in minutes on a CPU: pre-train, kill, resume, fine-tune, transcribe, translate.

    python scripts/demo.py [--exp-dir runs/demo] [--data-root data/prompts]

Every step is one of the project's own commands, printed before it runs. Running it again resumes what is not finished.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

SCRIPTS = Path(__file__).resolve().parent
KILL_AFTER_SAVES = 1
SHOWN = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--exp-dir", type=Path, default=Path("runs/demo"), help="run folders go here; default: %(default)s"
    )
    parser.add_argument("--data-root", type=Path, default=Path("data/prompts"), help="default: %(default)s")
    parser.add_argument("--pretrain-steps", type=int, default=800, help="default: %(default)s")
    parser.add_argument("--finetune-steps", type=int, default=600, help="of recognition; default: %(default)s")
    parser.add_argument("--translation-steps", type=int, default=500, help="default: %(default)s")
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
        stop(script, status)


def stop(script: str, status: int) -> NoReturn:
    sys.exit(f"demo: {script} ended with status {status}; mend what it says above and run the demo again")


def run_and_kill(script: str, checkpoints: Path, *arguments: object) -> None:
    """Run a script until it has saved, then kill it without notice (SIGKILL), as a lost machine would."""
    print("$ python", shlex.join(["scripts/" + script, *map(str, arguments)]), flush=True)
    process = subprocess.Popen(command(script, *arguments))
    while process.poll() is None and len(list(checkpoints.glob("*.ckpt"))) < KILL_AFTER_SAVES:
        time.sleep(0.2)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)  # some steps past the checkpoint, to be repeated
    process.kill()
    if (status := process.wait()) > 0:
        stop(script, status)
    how = "killed (SIGKILL)" if status else "ended before it could be killed"
    print(f"{how}; the same command again:", flush=True)


def steps(number: int) -> list[str]:
    """So many optimizer steps, validated three times."""
    return [f"trainer.max_steps={number}", f"trainer.val_check_interval={max(1, number // 3)}"]


def show(path: Path, titles: dict[str, str]) -> None:
    """Some lines of a file of transcripts, spread over it: the keys that ``titles`` names."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shown = lines[:: max(1, len(lines) // SHOWN)][:SHOWN]
    print(f"{len(lines)} utterances, {len(shown)} of them:")
    for line in shown:
        print("".join(f"  {title:>10}: {line[key]}\n" for key, title in titles.items()))


def with_translation(manifests: list[Path], out: Path) -> None:
    """A manifest of the rows that have an English wording."""
    with open(out, "w", encoding="utf-8") as file:
        for manifest in manifests:
            for row in map(json.loads, manifest.read_text(encoding="utf-8").splitlines()):
                if "translation" in row:
                    row["audio_filepath"] = os.path.abspath(manifest.parent / row["audio_filepath"])
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    folder = options.exp_dir
    common = ["model=tiny", f"exp_manager.exp_dir={folder}", f"data.root={options.data_root}"]
    names = ("prompts_one_stage", "asr_ctc", "st")
    pretrained, recogniser, translator = (folder / name / f"{name}.nemo" for name in names)
    manifests = options.data_root / "manifests"

    say("1. Human speech: telephone prompts in English, Spanish and French, and public-domain text")
    run("prepare_data.py", "prompts", "--root", options.data_root)

    say("2. Pre-training: speech, text and speech-text pairs in one encoder, all objectives at once; killed on the way")
    arguments = ["--config-name", "prompts_one_stage", *common, *steps(options.pretrain_steps)]
    checkpoints = pretrained.parent / "checkpoints"
    if not list(checkpoints.glob("*.ckpt")):
        run_and_kill("speech_pretrain.py", checkpoints, *arguments)
    run("speech_pretrain.py", *arguments)

    say("3. Spanish speech recognition: a stock NeMo CTC model around the pre-trained encoder")
    arguments = ["--config-name", "asr_ctc", *common, "data.language=es", *steps(options.finetune_steps)]
    run("speech_finetune.py", *arguments, f"init_from={pretrained}", "reinit_last_layers=2")

    say("4. Transcripts of test prompts, which no training has seen")
    out = folder / "es_test.jsonl"
    run("transcribe.py", recogniser, manifests / "es_test.json", "--out", out)
    show(out, {"text": "reference", "pred_text": "heard"})
    run("evaluate.py", out)

    say("5. Spanish and French speech to English text: a stock NeMo translation model around the same encoder")
    arguments = ["--config-name", "st", *common, *steps(options.translation_steps)]
    run("speech_finetune.py", *arguments, f"init_from={pretrained}")

    say("6. Translations of test prompts, which no training has seen")
    test, translations = folder / "st_test.json", folder / "st_test.jsonl"
    with_translation([manifests / f"{language}_test.json" for language in ("es", "fr")], test)
    run("transcribe.py", translator, test, "--out", translations)
    show(translations, {"text": "said", "translation": "reference", "pred_text": "translated"})
    run("evaluate.py", translations, "--reference", "translation", "--metrics", "bleu", "chrf")

    say("7. A report to look at: curves, health, examples, transcripts with their errors marked")
    report = folder / "report.html"
    runs = [nemo.parent for nemo in (pretrained, recogniser, translator)]
    run("report.py", *runs, "--transcripts", out, "--out", report)

    minutes = (time.perf_counter() - started) / 60
    print(f"\ndemo: {minutes:.1f} min; run folders, transcripts and translations are in {folder}")
    print(f"demo: open {report} in a browser")


if __name__ == "__main__":
    main()
