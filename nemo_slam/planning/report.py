"""A plan in words."""

from __future__ import annotations

from nemo_slam.planning.plan import USABLE, Plan, Run

GIB = 2**30


def report(run: Run, plan: Plan) -> str:
    """All of a plan; every figure is computed, none measured."""
    steps = int(run.config["trainer"]["max_steps"])
    sections = [
        ("parameters", _parameters(plan)),
        ("memory of one GPU", _memory(run, plan)),
        ("one step of one GPU", _step(run, plan)),
        (f"{steps:,} steps on {run.ranks} GPU(s)", _schedule(run, plan, steps)),
    ]
    lines = []
    for title, rows in sections:
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {text}" for name, text in rows)]
    return "\n".join(lines)


def _parameters(plan: Plan) -> list[tuple[str, str]]:
    rows = {**plan.parameters, "all": sum(plan.parameters.values())}
    return [(name, f"{count / 1e6:10.2f} M") for name, count in rows.items()]


def _memory(run: Run, plan: Plan) -> list[tuple[str, str]]:
    memory, batch = plan.memory, plan.batch
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "autocast's copies": memory.copies,
        "inputs": memory.inputs,
        **{f"activations, {part}": plan.tally.total(part).saved for part in plan.tally.operations},
    }
    rows = [(name, f"{size / GIB:8.2f} GiB") for name, size in parts.items()]
    rows.append(("all", f"{memory.total / GIB:8.2f} GiB of {run.gpu.memory / GIB:.0f}"))
    rows.append(
        (
            "micro-batch",
            f"{batch.speech.rows / 100:.1f} s of speech, {batch.text.rows:.0f} tokens, "
            f"{batch.pair_speech.rows / 100:.1f} s of pairs",
        )
    )
    limit = f"{100 * USABLE:.0f}% of its memory"
    if plan.accumulate is None:
        rows.append(("fits", f"no: weights, gradients and optimizer alone need more than {limit}"))
        return rows
    fitting = run.batch(plan.accumulate)
    advice = f"trainer.accumulate_grad_batches={plan.accumulate} is the least that fits {limit}: "
    advice += f"{fitting.speech.rows / 100:.1f} s of speech, {fitting.text.rows:.0f} tokens, "
    advice += f"{fitting.pair_speech.rows / 100:.1f} s of pairs"
    rows.append(("fits", f"{'yes' if plan.fits else 'no'}; {advice}"))
    return rows


def _step(run: Run, plan: Plan) -> list[tuple[str, str]]:
    speech = (plan.batch.speech.rows + plan.batch.pair_speech.rows) / 100 * run.accumulate
    return [
        ("arithmetic", f"{plan.flops / 1e12:10.2f} TFLOP"),
        ("memory traffic", f"{plan.moved / 1e9:10.1f} GB"),
        ("roofline", f"{plan.seconds:10.3f} s, of which {plan.exposed:.3f} s wait for gradients"),
        ("utilisation", f"{plan.flops / plan.seconds / run.gpu.flops_per_second(run.precision):10.1%} of matrix speed"),
        ("throughput", f"{speech / plan.seconds:10.0f} s of speech a second at most"),
    ]


def _schedule(run: Run, plan: Plan, steps: int) -> list[tuple[str, str]]:
    def row(seconds: float) -> str:
        days = seconds * steps / 86400
        return f"{days:8.1f} days, {24 * days * run.ranks:12,.0f} GPU-hours"

    return [
        ("at the roofline (no run reaches it)", row(plan.seconds)),
        (f"at {run.efficiency:.0%} of it (assumed)", row(plan.seconds / run.efficiency)),
    ]
