"""Shards survive kills: 20,000 utterances, the command killed at random and started again, every file compared.

    python benchmarks/shard_kills.py
    python benchmarks/shard_kills.py --utterances 500 --shards 5 --kills 3

Makes the shards once without a disturbance, then again with `scripts/shard_data.py` killed (SIGKILL, workers too) at
moments of its work drawn from the seed. Then one bit of one file of each sort is flipped, and `verify` must name that
file. Writes benchmarks/results/shard_kills_<time>.json and exits with 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
HALF = "*.part-*"  # files that are being written
SCRIPT = [sys.executable, str(ROOT / "scripts/shard_data.py")]


def write_corpus(folder: Path, utterances: int) -> Path:
    """Files of noise of 0.1 to 0.3 s, and their manifest."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    with (folder / "manifest.json").open("w") as manifest:
        for number in range(utterances):
            samples = rng.integers(-8000, 8000, int(rng.integers(1600, 4800)), dtype=np.int16)
            name = f"audio/{number}.wav"
            soundfile.write(folder / name, samples, 16000)
            row = {"audio_filepath": name, "duration": len(samples) / 16000, "text": f"utterance {number}"}
            manifest.write(json.dumps(row) + "\n")
    return folder / "manifest.json"


def shard(manifest: Path, out: Path, args: argparse.Namespace, limit: float = math.inf) -> tuple[bool, float | None]:
    """Runs the command, and kills it, workers too, ``limit`` seconds after its first file has been begun.

    Returns:
        Whether it was killed, and its seconds since that file; None if no file was seen being written.
    """
    command = [*SCRIPT, "audio", str(manifest), "--out", str(out), "--shards", str(args.shards)]
    command += ["--workers", str(args.workers)]
    old = set(out.rglob(HALF))
    begun: float | None = None
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            now = time.perf_counter()
            if begun is None and not old.issuperset(out.rglob(HALF)):
                begun = now
            if begun is not None and now - begun >= limit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return True, now - begun
            time.sleep(0.005)
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {errors.read().decode()[-2000:]}")
    return False, None if begun is None else time.perf_counter() - begun


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the records of the work itself, by name."""
    from nemo_slam.data.corpora.files import sha256

    files = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: sha256(path) for name, path in sorted(names.items()) if not name.startswith((".lock", ".records"))}


def missed_damage(folder: Path, rng) -> list[str]:
    """One flipped bit in a file of each sort, one after the other; the files that `verify` did not name."""
    missed = []
    for pattern in ("audio_*.tar", "audio_*.tar.idx", "sharded_manifests/*.json"):
        path = rng.choice(sorted(folder.glob(pattern)))
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[rng.integers(len(broken))] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        found = subprocess.run([*SCRIPT, "verify", str(folder)], capture_output=True, text=True)
        named = [line for line in found.stderr.splitlines() if line.startswith(f"error: {path}: ")]
        if found.returncode != 1 or len(named) != 1:
            missed.append(str(path.relative_to(folder)))
        path.write_bytes(whole)
    return missed


def measure(folder: Path, args: argparse.Namespace) -> dict:
    import numpy as np

    rng = np.random.default_rng(args.seed)
    manifest = write_corpus(folder, args.utterances)
    _, whole = shard(manifest, folder / "whole", args)
    if whole is None:
        raise RuntimeError(
            f"{args.utterances} utterances in {args.shards} shards: no file was seen being written, so no moment to "
            "kill at can be drawn. Take more --utterances, or fewer --shards"
        )
    kills = []
    for _ in range(args.kills):
        # Together about as long as the whole takes, so that kills strike from the first shard to the last.
        killed, seconds = shard(manifest, folder / "killed", args, float(rng.uniform(0, 2 * whole / args.kills)))
        if not killed or seconds is None:
            break
        tars = len(list((folder / "killed").glob("audio_*.tar")))
        halves = len(list((folder / "killed").rglob(HALF)))
        kills.append({"seconds": round(seconds, 2), "finished_tars": tars, "half_files": halves})
    shard(manifest, folder / "killed", args)
    expected, found = digests(folder / "whole"), digests(folder / "killed")
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    intact = subprocess.run([*SCRIPT, "verify", str(folder / "killed")], capture_output=True).returncode == 0
    return {
        "utterances": args.utterances,
        "shards": args.shards,
        "workers": args.workers,
        "seed": args.seed,
        "whole_seconds": round(whole, 1),
        "kills": kills,
        "files_compared": len(expected),
        "differing_files": differing,
        "verified": intact,
        "missed_damage": missed_damage(folder / "killed", rng),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--shards", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: %(default)s")
    parser.add_argument("--kills", type=int, default=10, help="at most; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    parser.add_argument("--out", type=Path, help="result file (default: results/shard_kills_<time>.json)")
    args = parser.parse_args()
    if min(args.utterances, args.shards, args.workers, args.kills) < 1:
        parser.error("--utterances, --shards, --workers and --kills must be at least 1")
    with tempfile.TemporaryDirectory(prefix="shard_kills_") as folder:
        found = measure(Path(folder), args)
    from nemo_slam.training.environment import environment

    result = {"benchmark": "shard_kills", **environment(), **found}
    print(json.dumps(result, indent=1))
    out = args.out or RESULTS / f"shard_kills_{result['time'].replace(':', '').replace('+0000', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}", file=sys.stderr)
    return 1 if found["differing_files"] or found["missed_damage"] or not found["verified"] else 0


if __name__ == "__main__":
    sys.exit(main())
