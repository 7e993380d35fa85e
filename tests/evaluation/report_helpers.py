"""Run folders made up by hand, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

STEPS = range(100, 2001, 100)
CODES = 32


def write_run(folder: Path, perplexity: float, gain: float, loss: float = 6.0, **others: object) -> Path:
    """A stage 1 run of 2,000 steps with a validation every 500: codes end at the given perplexity and information gain.

    Args:
        others: ``bad_loss`` (a step whose loss is NaN), ``skipped`` (updates), ``lr``.
    """
    folder.mkdir(parents=True)
    columns = [
        "step",
        "loss",
        "masked_speech/contrastive",
        "masked_speech/code_accuracy",
        "masked_speech/code_top_share",
    ]
    columns += ["skipped_steps", "masked_speech/code_perplexity", "masked_speech/code_information_gain", "lr"]
    columns += ["frames_per_second", "tokens_per_second", "padding_share", "seconds", "brand_new/figure"]
    validation = ["val_loss", "val_masked_speech/code_perplexity", "val_masked_speech/code_information_gain"]
    lines = [",".join(columns + validation)]
    skipped = int(others.get("skipped", 0))  # type: ignore[call-overload]
    for step in STEPS:
        done = step / 2000
        now = "nan" if step == others.get("bad_loss") else f"{10 - (10 - loss) * done:.9g}"
        values = [
            step,
            now,
            4 - done,
            0.1 + 0.3 * done,
            0.1,
            skipped if step == 1000 else 0,
            CODES - (CODES - perplexity) * done,
        ]
        values += [gain * done, 1e-3 * done, 5000 + step, 2500, 0.09, 5.5, step**2]
        lines.append(",".join(map(str, values)) + "," * len(validation))
        if step % 500 == 0:
            lines.append(f"{step}" + "," * len(columns) + f"{now},{perplexity},{gain}")
    lines.append("2100,5.9,1.0")  # cut off by a kill
    (folder / "metrics.csv").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "seed": 0,
                "name": folder.name,
                "model": {
                    "objectives": {"masked_speech": {"weight": 1.0}},
                    "conformer": {"d_model": 144},
                    "quantizer": {"num_codes": CODES},
                    "optim": {"lr": others.get("lr", 1e-3)},
                },
                "trainer": {"max_steps": 2000},
            }
        )
    )
    rows = [{"step": 950 + i, "reason": "the loss is not finite", "ids": {}} for i in range(skipped)]
    (folder / "skipped_steps.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2100, "ids": {"speech": []}'
    )
    (folder / "bad_rows.jsonl").write_text('{"file": "x", "line": 3}\n{"file": "x", "li')
    return folder


def write_transcripts(path: Path) -> Path:
    rows = [
        {"audio_filepath": "a.wav", "text": "uno dos tres", "translation": "one two", "pred_text": "uno tres"},
        {"audio_filepath": "b.wav", "text": "cuatro", "translation": "four", "pred_text": "cinco <b>seis</b>"},
        {"audio_filepath": "c.wav", "text": "siete ocho", "translation": "seven", "pred_text": "siete ocho"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
