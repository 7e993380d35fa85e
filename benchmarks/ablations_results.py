"""Results of the ablations from the records of their arms: scores, differences, held-out figures, compute; the files
that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablations_records import FIGURES, counts_of  # these two beside this file
from ablations_settings import BASE, UNTRAINED

from nemo_slam.evaluation.comparison import compare_counts

if TYPE_CHECKING:
    from ablations import Plan


def results(plan: Plan, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the records say, by arm, one of each seed; ``ablations_page`` writes it out."""
    scores = compare_counts({arm: [counts_of(record) for record in own] for arm, own in records.items()}, BASE)
    every = [record for own in records.values() for record in own]
    return {
        "corpus": every[0]["speakers"],
        "settings": asdict(plan.settings),
        "seeds": plan.seeds,
        "labelled": every[0]["labelled"],
        "base": records[BASE][0]["trained_on"] if BASE in records else None,
        "variants": {arm: _variant(plan, arm, own) | scores[arm] for arm, own in records.items()},
        "CPU": sorted({record["CPU"] for record in every}),
        "commits": sorted({record["commit"] for record in every}),
        "hours": sum(sum(record["seconds"].values()) for record in every) / 3600,
    }


def _variant(plan: Plan, arm: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures = [record["held_out"] for record in records]
    times = [(name.startswith("pretrain"), s) for record in records for name, s in record["seconds"].items()]
    trained = arm != UNTRAINED
    return {
        "title": plan.settings.variants[arm].title if trained else "no pre-training: the encoder as it was drawn",
        "held_out": {
            figure.title: [found[figure.title] for found in figures]
            for figure in FIGURES
            if all(figure.title in found for found in figures)
        },
        "minutes": {
            "pre-training": sum(s for first, s in times if first) / (60 * len(records)),
            "fine-tuning": sum(s for first, s in times if not first) / (60 * len(records)),
        },
    }


def write(found: Mapping[str, Any], numbers: Path, text: Path) -> None:
    """``ablations.json``, and ``ablations.md`` with its pictures in ``images``, in these folders."""
    from ablations_page import page, pictures  # beside this file

    content = {
        numbers / "ablations.json": json.dumps(found, indent=1, ensure_ascii=False).encode() + b"\n",
        **{text / "images" / name: picture for name, picture in pictures(found).items()},
        text / "ablations.md": page(found).encode(),
    }
    for path, data in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"ablations: {path}")
