"""The project's goals beside what a run measured, for the result file and the terminal."""

from __future__ import annotations

from typing import Any

MIX = "B16 T1600"
ROWS = "M16384 D1024 K100"


def goal(name: str, wanted: float, measured: float | None, unit: str = "x", at_most: bool = False) -> dict[str, Any]:
    """A row: what is wanted at least (or at most), what was measured (None: not in this run), whether it is met."""
    met = None if measured is None else measured <= wanted if at_most else measured >= wanted
    row = {"goal": name, "wanted": wanted, "measured": measured, "unit": unit}
    return {**row, "bound": "at most" if at_most else "at least", "met": met}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """One for the terminal a goal."""
    words = {True: "met", False: "NOT MET", None: "not measured"}

    def figure(value: float | None, unit: str) -> str:
        return "-" if value is None else f"{value:.1%}" if unit == "share" else f"{value:.2f} {unit}"

    return [
        f"  goal: {row['goal']}: {figure(row['measured'], row['unit'])}, wanted {row['bound']} "
        f"{figure(row['wanted'], row['unit'])}: {words[row['met']]}"
        for row in rows
    ]


def of_kernels(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of the kernels on an H100: those of the paper's shape. A figure counts if the operator's tests pass."""
    failing = result["failing_tests"]
    rows = {
        (row["operator"], row["mix"], row["implementation"]): row
        for row in result["rows"]
        if failing is not None and not any(test.startswith(row["operator"]) for test in failing)
    }

    def value(operator: str, mix: str, implementation: str, kind: str, key: str = "median_ms") -> float | None:
        return rows.get((operator, mix, implementation), {}).get(kind, {}).get(key)

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or below is None else above / below

    found = []
    name = "glu_conv_group_norm_silu"
    for kind in ("forward", "both"):
        limit = rows.get((name, MIX, "triton"), {}).get(f"{kind}_limit_ms")
        share = ratio(limit, value(name, MIX, "triton", kind))
        found.append(goal(f"{name}, {MIX}, {kind}: of the copy bandwidth", 0.8, share, "share"))
    own = value(name, MIX, "triton", "both")
    for other, wanted in (("stock padded", 2.2), ("stock padded compiled", 1.4)):
        found.append(goal(f"{name}, {MIX}, both: against {other}", wanted, ratio(value(name, MIX, other, "both"), own)))
    name = "span_contrastive"
    own = value(name, ROWS, "triton", "both")
    found.append(
        goal(f"{name}, {ROWS}, both: against gathered", 3.0, ratio(value(name, ROWS, "gathered", "both"), own))
    )
    peak = value(name, ROWS, "triton", "both", "peak_bytes")
    gib = None if peak is None else peak / 2**30
    found.append(goal(f"{name}, {ROWS}, both: memory", 1.0, gib, "GiB", at_most=True))
    return found
