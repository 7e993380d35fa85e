"""How well the planner meets real steps: operations, what is kept for the backward, and memory, on a CPU.

    python benchmarks/plan_errors.py              half a minute of one core

Steps of noise through models as they are trained, from the config. Operations are torch's own count, what is kept is
what autograd stores, and the memory of a step, AdamW's included, comes from the profiler's record of allocations.
Writes benchmarks/results/plan_errors_<time>.json and exits with 1 if a plan is off by more than a tenth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
WITHIN = 0.10


@dataclass(frozen=True)
class Case:
    """A stage, a size and the examples of its step.

    Attributes:
        speech: seconds of the utterances.
        text: tokens of the texts.
        pairs: seconds, tokens, and tokens of the negative text.
    """

    name: str
    stage: str
    model: str
    speech: tuple[float, ...]
    text: tuple[int, ...]
    pairs: tuple[tuple[float, int, int], ...]
    changes: tuple[str, ...] = ()


LARGE = (2.1, 3.7, 5.0, 4.6), (12, 25, 31, 18, 40), ((2.0, 9, 12), (3.1, 17, 15), (2.6, 14, 14))
SMALL = (2.1, 1.7), (12, 25), ((1.5, 9, 12),)
CTC_ON_SPEECH = ("model.objectives.ctc={weight: 1.0, input: speech}",)
CASES = [
    Case("stage1-tiny", "slam_stage1", "tiny", *LARGE),
    Case("all-tiny", "slam_one_stage", "tiny", *LARGE),
    Case("all-base", "slam_one_stage", "base", *SMALL),
    Case("ctc-on-speech-tiny", "slam_stage2", "tiny", *SMALL, CTC_ON_SPEECH),
]


def micro_batch(speech: Iterable[float], text: Iterable[int], pairs: Iterable[tuple[float, int, int]]) -> Any:
    """The planner's view of a step."""
    from nemo_slam.planning.workload import Lengths, MicroBatch

    seconds, tokens, negatives = zip(*pairs, strict=True)
    frames = ([round(100 * s) for s in spoken] for spoken in (speech, seconds))
    spoken, paired = map(Lengths.of, frames)
    return MicroBatch(spoken, Lengths.of(list(text)), paired, Lengths.of(tokens), Lengths.of(negatives))


def noise(case: Case) -> Any:
    """The step itself."""
    import torch

    from nemo_slam.data.batch import PairBatch, SpeechBatch, StepBatch, TextBatch

    generator = torch.Generator().manual_seed(0)

    def audio(seconds: Iterable[float]) -> tuple[Any, Any]:
        lengths = torch.tensor([round(16000 * s) for s in seconds])
        waves = torch.randn(len(lengths), int(lengths.max()), generator=generator) * 0.1
        return waves * (torch.arange(waves.shape[1]) < lengths[:, None]), lengths

    def tokens(lengths: Iterable[int]) -> tuple[Any, Any]:
        counts = torch.tensor(list(lengths))
        return torch.randint(0, 32, (int(counts.sum()),), generator=generator), counts

    def identity(examples: Any) -> dict[str, Any]:
        return {"ids": torch.arange(len(examples)), "epochs": torch.zeros(len(examples), dtype=torch.int64)}

    seconds, own, negative = zip(*case.pairs, strict=True)
    texts = *tokens(own), *tokens(negative), torch.arange(len(case.pairs))
    return StepBatch(
        step=0,
        speech=SpeechBatch(*audio(case.speech), **identity(case.speech)),
        text=TextBatch(*tokens(case.text), **identity(case.text)),
        pairs=PairBatch(*audio(seconds), *texts, **identity(case.pairs)),
    )


def counted_operations(run: Callable[[], Any]) -> float:
    """Floating-point operations of ``run()``; attention as plain products, since torch counts no fused one of a CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def saved_bytes(model: Any, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps between forward and backward, weights left out, each storage once."""
    import torch

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()  # alive while it is measured, so that no storage is given out twice
    assert loss.requires_grad
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that ``run()`` holds at a time beyond what was there, from the profiler's record of every allocation."""
    import numpy as np
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["args"]["Ev Idx"])]
    return int(max(np.cumsum(changes)))


def bytes_of(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def measure(case: Case, tokenizer_model: Path) -> dict[str, tuple[float, float]]:
    """Planned and measured by quantity: operations, or bytes."""
    import torch
    from omegaconf import OmegaConf
    from step_workload import pretraining_model, resolved_config

    from nemo_slam.planning.hardware import GPUS
    from nemo_slam.planning.operations import PRECISIONS
    from nemo_slam.planning.plan import Run, memory_of, tally_of

    # Rows are rounded up on a GPU alone.
    changes = [*case.changes, "model.conformer.kernels=torch", "model.pad_multiple=1", "trainer.precision=32-true"]
    changes.append(f"data.tokenizer.model_path={tokenizer_model}")
    config = resolved_config(case.model, case.stage, changes)
    torch.manual_seed(0)
    model = pretraining_model(config, tokenizer_model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    batch, planned_batch = noise(case), micro_batch(case.speech, case.text, case.pairs)
    whole: Any = OmegaConf.to_container(config, resolve=True)

    operations = counted_operations(lambda: model.losses(batch)[0].backward())
    optimizer.step()
    gradients = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    state = bytes_of(tensor for values in optimizer.state.values() for tensor in values.values())
    weights = bytes_of(model.parameters())
    held = weights + gradients + state + bytes_of([batch.speech.audio, batch.pairs.audio])

    def step() -> None:
        # Gradients stay where they are, as they do under DistributedDataParallel.
        optimizer.zero_grad(set_to_none=False)
        model.losses(batch)[0].backward()
        optimizer.step()

    activations = saved_bytes(model, lambda: model.losses(batch)[0])
    peak = held + peak_bytes(step)

    def tally(**options: Any) -> Any:
        return tally_of(whole["model"], planned_batch, PRECISIONS["32-true"], fused=False, **options)

    kept = tally(mask_bytes=4)  # a CPU's dropout keeps its noise
    memory = memory_of(Run(whole, GPUS["h100"], 1, fused=False), planned_batch, kept)
    return {
        "operations": (sum(tally(fused_attention=False).total().products), operations),
        "weights": (memory.weights, weights),
        "gradients": (memory.gradients, gradients),
        "optimizer": (memory.optimizer, state),
        "activations": (kept.total().saved, activations),
        "memory of a step": (memory.total, peak),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (default: results/plan_errors_<time>.json)")
    options = parser.parse_args(arguments)
    import torch
    from step_workload import tokenizer

    from nemo_slam.training.environment import environment

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"{'case':20s}{'quantity':18s}{'planned':>14s}{'measured':>14s}{'error':>8s}   (operations, or bytes)")
    with tokenizer(32) as tokenizer_model:
        for case in CASES:
            for quantity, (planned, measured) in measure(case, tokenizer_model).items():
                error = planned / measured - 1
                row = {"case": case.name, "quantity": quantity, "planned": planned, "measured": measured}
                rows.append({**row, "error": error})
                print(f"{case.name:20s}{quantity:18s}{planned / 1e6:12.2f} M{measured / 1e6:12.2f} M{error:+8.1%}")
    result: dict[str, Any] = {"benchmark": "plan_errors", **environment(), "allowed": WITHIN, "rows": rows}
    out = options.out or RESULTS / f"plan_errors_{result['time'].replace(':', '').replace('+0000', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")
    beyond = [row for row in rows if not abs(row["error"]) <= WITHIN]
    for row in beyond:
        print(f"{row['case']}: {row['quantity']} is off by {row['error']:+.1%}, beyond {WITHIN:.0%}", file=sys.stderr)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
