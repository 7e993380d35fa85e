"""How the data side starts and runs on a large corpus: 10 million utterances and a token file of 1 billion tokens.

    python benchmarks/data_scale.py                              # the full size; 5 GB in a temporary folder
    python benchmarks/data_scale.py --examples 100000 --tokens 1000000 --batches 200

Generates a manifest whose rows all name one recording of a second, and a token file; builds the indexes, which happens
once a corpus; then, in a process of its own as training would, opens the streams, loads batches with workers, and
watches the workers' memory. Writes benchmarks/results/data_scale_<time>.json and exits with 1 if an aim is missed:
start within 60 s, less than 1 GiB a worker, no growth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
START_SECONDS, WORKER_MIB, GROWTH_MIB = 60.0, 1024.0, 16.0
CHUNK = 100_000


def write_manifest(folder: Path, examples: int) -> Path:
    """Rows of 0.3 to 1 s of one recording."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", (0.1 * rng.standard_normal(16000)).astype(np.float32), 16000)
    with (folder / "manifest.json").open("w") as file:
        for first in range(0, examples, CHUNK):
            durations = rng.uniform(0.3, 1.0, min(CHUNK, examples - first)).round(3)
            file.writelines(f'{{"audio_filepath": "a.wav", "duration": {d:.3f}}}\n' for d in durations)
    return folder / "manifest.json"


def write_tokens(folder: Path, tokens: int) -> Path:
    """A text index with texts of 20 to 180 tokens, written without a text: no tokenizer reads a billion in minutes."""
    import numpy as np
    import sentencepiece

    from nemo_slam.data.text import open_text_index
    from nemo_slam.data.token_file import Tokenizer, TokenWriter

    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(500)) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=128, minloglevel=2
    )
    model = Tokenizer(folder / "tokenizer.model")

    def scan(builder) -> None:
        line = 0
        with TokenWriter(builder.folder, model.dtype) as writer:
            while writer.size < tokens:
                lengths = rng.integers(20, 181, CHUNK // 100)
                content = rng.integers(0, model.vocab_size, int(lengths.sum()), dtype=np.int64)
                for length, end in zip(lengths.tolist(), np.cumsum(lengths).tolist(), strict=True):
                    if writer.size >= tokens:
                        break
                    line += 1
                    builder.add(length, writer.append(content[end - length : end]), 0, line)
        builder.end_source()
        builder.arrays["tokens"] = (writer.dtype, writer.size)
        builder.meta |= {"split_lines": 0, "unknown_tokens": 0}

    open_text_index(streams_of(folder)["text"], [folder / "text.txt"], model, scan)
    return folder / "text.txt"


def nodes(folder: Path) -> dict:
    return {
        "speech": {"manifest_filepath": str(folder / "manifest.json"), "frames_per_step": 2000},
        "text": {"text_filepath": str(folder / "text.txt"), "tokens_per_step": 2000},
    }


def streams_of(folder: Path) -> dict:
    from nemo_slam.data.config import parse_streams

    return parse_streams(nodes(folder), "train_ds")


def memory_mib(pid: int) -> dict[str, float]:
    """Resident memory of a process, and the part of it that no file backs."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {"resident": found["VmRSS"], "anonymous": found["RssAnon"]}


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(folder: Path, batches: int, workers: int) -> dict:
    """What one process of a training sees: start, then batches."""
    started = time.perf_counter()
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    from nemo_slam.data.loader import StepDataset, build_streams, step_loader

    streams = build_streams(nodes(folder), seed=0, tokenizer=folder / "tokenizer.model")
    loader = iter(step_loader(StepDataset(streams), 0, batches, num_workers=workers))
    assert isinstance(loader, _MultiProcessingDataLoaderIter)  # whose workers are watched
    next(loader)
    start_seconds = time.perf_counter() - started
    pids = [worker.pid for worker in loader._workers if worker.pid is not None]
    start_cpu_seconds = time.process_time() + sum(map(cpu_seconds, pids))
    early: list[dict[str, float]] = []
    most = 0.0
    begun = time.perf_counter()
    for number, _ in enumerate(loader, start=2):
        if number % max(1, batches // 20) == 0:
            now = [memory_mib(pid) for pid in pids]
            most = max(most, *(m["resident"] for m in now))
            if not early and number >= batches // 5:
                early = now
            latest = now
    growth = max(b["anonymous"] - a["anonymous"] for a, b in zip(early, latest, strict=True))
    return {
        "start_seconds": round(start_seconds, 2),
        "start_cpu_seconds": round(start_cpu_seconds, 2),
        "load_average": os.getloadavg()[0],
        "worker_mib": round(most, 1),
        "growth_mib": round(growth, 1),
        "batches_per_second": round((batches - 1) / (time.perf_counter() - begun), 1),
        "rows": {name: len(stream.index) for name, stream in streams.items()},
        "tokens": streams["text"].index.meta["total_length"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000_000, help="rows of the manifest")
    parser.add_argument("--tokens", type=int, default=1_000_000_000, help="tokens in the token file")
    parser.add_argument("--batches", type=int, default=1000, help="batches to load, at least 20")
    parser.add_argument("--workers", type=int, default=1, help="loading processes, at least 1")
    parser.add_argument(
        "--folder", type=Path, help="where to generate; default: a temporary folder, removed at the end"
    )
    parser.add_argument("--out", type=Path, help="result file (default: results/data_scale_<time>.json)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batches < 20 or args.workers < 1 or args.examples < 1 or args.tokens < 1:
        parser.error("--batches must be at least 20; --workers, --examples and --tokens at least 1")
    if args.measure is not None:
        print(json.dumps(run(args.measure, args.batches, args.workers)))
        return 0
    with tempfile.TemporaryDirectory(prefix="data_scale_") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        write_manifest(folder, args.examples)
        written = time.perf_counter()
        write_tokens(folder, args.tokens)
        tokens_written = time.perf_counter()

        from nemo_slam.data.speech import SpeechStream

        SpeechStream(streams_of(folder)["speech"], seed=0)
        indexed = time.perf_counter()
        command = [sys.executable, __file__, "--measure", str(folder)]
        command += ["--batches", str(args.batches), "--workers", str(args.workers)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    from nemo_slam.training.environment import environment

    result = {
        "benchmark": "data_scale",
        **environment(),
        **result,
        "manifest_seconds": round(written - begun, 1),
        "token_file_seconds": round(tokens_written - written, 1),
        "index_seconds": round(indexed - tokens_written, 1),
        "batches": args.batches,
        "workers": args.workers,
    }
    result["within_aims"] = {
        "start": result["start_seconds"] < START_SECONDS,
        "memory": result["worker_mib"] < WORKER_MIB,
        "growth": result["growth_mib"] < GROWTH_MIB,
    }
    print(json.dumps(result, indent=1))
    out = args.out or RESULTS / f"data_scale_{result['time'].replace(':', '').replace('+0000', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}", file=sys.stderr)
    return 0 if all(result["within_aims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
