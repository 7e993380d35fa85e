"""Does training in FP8 go as in bfloat16? Both from one seed, on the same batches; losses side by side.

    python benchmarks/fp8_losses.py [--steps 200] [--modes gemm attention]

A model with heads of 128 trains on stage 1's objectives: tones as speech, walks through neighbouring tokens as text.
Needs a GPU with FP8 and Transformer Engine, and says so where there is none.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NETWORK = [
    "model.conformer.d_model=512",
    "model.conformer.d_ff=2048",
    "model.conformer.n_heads=4",
    "model.conformer.dropout=0.0",
    "model.text_encoder.dropout=0.0",
    "model.speech_encoder.num_layers=4",
    "model.multimodal_encoder.num_layers=6",
    "model.quantizer.code_dim=512",
    "model.text_encoder.vocab_size=256",
]
LAST = 20
"""Steps whose mean is compared."""
TOLERANCE = 0.01


def train(mode: str, steps: int, budget: int) -> tuple[list[float], float]:
    """Losses of each step, and seconds for those after the first sight of each batch, in a mode of ``fp8``; ``none`` is
    bfloat16."""
    import torch
    from omegaconf import OmegaConf
    from step_workload import batches, pretraining_model, resolved_config, step_batch, tokenizer

    from nemo_slam.training.optimizers import FastestAdamW

    device = torch.device("cuda")
    config = resolved_config("slam", "slam_stage1", NETWORK)
    config = OmegaConf.merge(config, {"model": {"conformer": {"fp8": mode}}})
    torch.manual_seed(0)
    with tokenizer(256) as tokenizer_model:
        model = pretraining_model(config, tokenizer_model).to(device).train()
    optimizer = FastestAdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98))
    utterances = batches("loose", budget, 8)
    data = [step_batch(utterances[i % len(utterances)], i, structured=True) for i in range(16)]
    losses, begin = [], 0.0
    for step in range(steps):
        if step == min(len(data), steps - 1):  # what a batch's shape makes the machine compile or plan is done once
            torch.cuda.synchronize()
            begin = time.perf_counter()
        batch = data[step % len(data)].to(device)
        batch.step = step
        with torch.autocast("cuda", torch.bfloat16):
            loss, _, _ = model.losses(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return torch.stack(losses).tolist(), seconds


def main(arguments: list[str]) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--frames", type=int, default=12_000, help="10 ms frames of a batch")
    made.add_argument("--modes", nargs="+", default=["gemm", "attention"], choices=("gemm", "attention"))
    made.add_argument("--out", type=Path, help="result file (default: results/fp8_losses_<device>_<time>.json)")
    options = made.parse_args(arguments)
    import torch
    from step_goals import lines, of_losses
    from step_workload import forget_scales

    from nemo_slam.modules import fp8
    from nemo_slam.training.environment import environment

    for mode in options.modes:
        reason = fp8.unavailable(mode, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if reason is not None:
            print(f"fp8 {mode}: {reason}", file=sys.stderr)
            return 1
    result: dict[str, Any] = {**environment(), "benchmark": "fp8_losses", "arguments": arguments, "runs": {}}
    stamp = result["time"].replace(":", "").replace("+0000", "")
    out = options.out or RESULTS / f"fp8_losses_{result['device'].replace(' ', '_')}_{stamp}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    good = True
    for mode in ("none", *options.modes):
        losses, seconds = train(mode, options.steps, options.frames)
        last = sum(losses[-LAST:]) / len(losses[-LAST:])
        run = {"first_loss": losses[0], "last_loss": last, "seconds": seconds, "losses": losses}
        result["runs"][mode] = run
        reference = result["runs"]["none"]
        run["difference"] = abs(last - reference["last_loss"]) / abs(reference["last_loss"])
        run["speed"] = reference["seconds"] / seconds
        within = run["difference"] <= TOLERANCE
        good &= within
        print(
            f"fp8 {mode:10s}loss {losses[0]:.4f} -> {last:.4f}, {run['difference']:.2%} from bfloat16"
            f"{'' if within else ': TOO FAR'}; {run['speed']:.2f}x its speed",
            flush=True,
        )
        gc.collect()
        forget_scales()
        result["goals"] = of_losses(result, TOLERANCE)
        out.write_text(json.dumps(result, indent=1) + "\n")  # after each, for a run that is cut short
    print(*lines(result["goals"]), f"written: {out}", sep="\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
