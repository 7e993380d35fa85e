"""Every kernel at the sizes of the paper's model, with the registers it may use and the loads it must have.

``python ahead_of_time_cases.py`` compiles them all and prints one line of JSON each; ``--table`` prints Markdown.
"""

from __future__ import annotations

import json
import sys

import torch
import triton.language as tl
from ahead_of_time import TARGETS, Case, compile_case

from slam_kernels.fused import (
    apply_spans,
    contrastive_kernels,
    convolution_gradient_kernels,
    convolution_kernels,
    corrupt_tokens,
    cross_entropy_kernels,
    glu_conv_group_norm_silu,
    gumbel_noise,
    masked_cross_entropy,
    sample_distractors,
    sample_spans,
    span_contrastive,
)

C, GROUPS, MASKED, VOCAB = 1024, 32, 100, 32_000
POINTERS = {"CU": "*i32", "IDS": "*i64", "EPOCHS": "*i64", "MASK": "*i8", "THROUGH": "*i64", "INDEX": "*i64"}
NAMES = {"bf16": "bfloat16", "fp32": "float32"}
SCALARS = {"S": "i32", "N": "i32", "M": "i32", "first_block": "i32", "key": "i64", "eps": "fp32", "std": "fp32"}


def convolution(name: str, pass_name: str, dtype: str, taps: int, cap: int, **wanted) -> Case:
    """One pass of the convolution as the operator would launch it."""
    kernel = getattr(convolution_kernels, name, None) or getattr(convolution_gradient_kernels, name)
    x, cu_seqlens = (torch.empty(0, 2 * C, dtype=kind) for kind in (getattr(torch, NAMES[dtype]), torch.int32))
    launch = glu_conv_group_norm_silu.plan(pass_name, x, taps, True, cu_seqlens.new_empty(17), GROUPS, 1)
    constants = {**launch.finishing, **launch.rolling, "G": GROUPS}
    warps = 4 if name.endswith("_finish") else constants["num_warps"]
    signature = {**SCALARS, **POINTERS, **dict.fromkeys(("X", "Z", "DZ", "DX"), f"*{dtype}")}
    parameters = ("W", "BIAS", "GAMMA", "BETA", "PART", "MEAN", "RSTD", "DMEAN", "DNORM")
    signature.update(dict.fromkeys(parameters, "*fp32"))
    # Every target for what the paper's model trains with; the newest that it was written for in other cases.
    targets = TARGETS if (dtype, taps) == ("bf16", 5) else (90,)
    return case(f"{name} {dtype} K{taps}", kernel, signature, constants, warps, cap, wanted=wanted, targets=targets)


def case(name: str, kernel, signature: dict, constants: dict, warps: int, cap: int, **rest) -> Case:
    """A case with only the arguments that the kernel has."""
    mine = set(kernel.arg_names)
    return Case(
        name,
        kernel,
        {k: v for k, v in signature.items() if k in mine},
        {k: v for k, v in constants.items() if k in mine},
        warps,
        cap,
        **rest,
    )


def vectors(name: str, dtype: str, cap: int, **wanted) -> Case:
    """A kernel of the contrastive loss at D = 1024 and 100 distractors."""
    constants = span_contrastive._constants(1024, MASKED, torch.bfloat16)
    constants.pop("num_warps")
    signature = {
        **dict.fromkeys(("CONTEXTS", "TARGETS", "ROWS", "DCONTEXTS", "DTARGETS"), f"*{dtype}"),
        **dict.fromkeys(("DRAWN", "ORDER", "BOUNDS"), "*i64"),
        **dict.fromkeys(("CSCALE", "TSCALE", "LOGITS", "LSE", "OWN", "LOSS", "GRAD", "SCALE"), "*fp32"),
        "CORRECT": "*i8",
        "inverse_temperature": "fp32",
    }
    return case(f"{name} {dtype}", getattr(contrastive_kernels, name), signature, constants, 4, cap, wanted=wanted)


def entropy(name: str, cap: int, **wanted) -> Case:
    """A kernel of the cross entropy at a vocabulary of 32,000."""
    constants = masked_cross_entropy._constants(VOCAB, torch.empty(0), torch.bfloat16)
    warps = constants.pop("num_warps")
    signature = {
        **dict.fromkeys(("LOGITS", "BIAS", "LOSS", "LSE", "GRAD"), "*fp32"),
        "TARGETS": "*i64",
        "CORRECT": "*i8",
        "SLOPES": "*bf16",
    }
    return case(name, getattr(cross_entropy_kernels, name), signature, constants, warps, cap, wanted=wanted)


def packed(name: str, kernel, constants: dict, cap: int, *, warps: int = 4, fused: bool = True, **pointers) -> Case:
    """A sampler or masker."""
    signature = {**SCALARS, **POINTERS, **pointers}
    return case(name, kernel, signature, constants, warps, cap, options={"enable_fp_fusion": fused})


def cases() -> list[Case]:
    """All of them. Caps are a little above what ptxas of Triton 3.6 and 3.7 gave; loads are those inside the loops."""
    rows = {"STEPS": 9, "BLOCK": 128}
    draws = {"STEPS": 9, "QUADS": 32, "ROWS": 8, "NUM": MASKED}
    tokens = {"TOKENS": "*i64", "OUT": "*i64", "mask_id": "i32", "vocab": "i32", "masks": "i32", "changes": "i32"}
    return [
        convolution("statistics_partials", "statistics", "bf16", 5, 144, loads_16=10),
        convolution("statistics_partials", "statistics", "fp32", 5, 80, loads_16=10),
        convolution("statistics_finish", "statistics", "bf16", 5, 48),
        convolution("normalise", "normalise", "bf16", 5, 148, loads_16=10, stores_16=5),
        convolution("normalise", "normalise", "fp32", 5, 84, loads_16=10, stores_16=5),
        convolution("normalise", "normalise", "bf16", 31, 88),
        convolution("norm_gradient_partials", "norm_gradient", "bf16", 5, 172, loads_16=15),
        convolution("norm_gradient_partials", "norm_gradient", "fp32", 5, 104, loads_16=15),
        convolution("norm_gradient_finish", "norm_gradient", "bf16", 5, 48),
        # 16 bytes of bfloat16 are 8 channels a lane, whose two windows would spill: 8 bytes here, five rows in flight.
        convolution("input_gradient", "input_gradient", "bf16", 5, 168, loads_8=20, stores_8=10),
        convolution("input_gradient", "input_gradient", "fp32", 5, 164, loads_16=20, stores_16=10),
        convolution("input_gradient", "input_gradient", "bf16", 15, 176),
        convolution("input_gradient", "input_gradient", "bf16", 31, 220),
        packed("spans_by_start", sample_spans.spans_by_start, {**rows, "SPAN": 10}, 40, threshold="i32"),
        packed("spans_by_budget", sample_spans.spans_by_budget, {"SPAN": 5, "BLOCK": 256}, 64, threshold="i32"),
        packed(
            "replace_rows bf16 noise",
            apply_spans.replace_rows,
            {"D": C, "STEPS": 9, "QUADS": 256, "LEARNED": False},
            40,
            fused=False,
            X="*bf16",
            Y="*bf16",
            VECTOR="*bf16",
        ),
        packed(
            "replace_rows_backward bf16 learned",
            apply_spans.replace_rows_backward,
            {"D": C, "ROWS": 32, "COLUMNS": 256, "LEARNED": True, "ACC": tl.float32},
            88,
            GRAD="*bf16",
            DX="*bf16",
            PART="*fp32",
        ),
        packed("corrupt_rows", corrupt_tokens.corrupt_rows, rows, 32, **tokens),
        packed("draw_distractors", sample_distractors.draw_distractors, draws, 40, BOUNDS="*i64", OUT="*i64"),
        packed(
            "draw_gumbel fp32",
            gumbel_noise.draw_gumbel,
            {**draws, "QUADS": 128, "ROWS": 4, "NUM": 1024},
            40,
            fused=False,
            OUT="*fp32",
        ),
        vectors("inverse_lengths", "bf16", 24, loads_16=1),
        vectors("contrastive_rows", "bf16", 72, loads_16=8),
        vectors("context_gradient", "bf16", 56, loads_16=8),
        vectors("target_gradient", "bf16", 56, loads_16=8),
        entropy("cross_entropy_rows", 64, loads_16=4),
        entropy("cross_entropy_gradient", 56, loads_16=4),
    ]


def main(arguments: list[str]) -> None:
    results = []
    for one in cases():
        for target in one.targets:
            result = {**compile_case(one, target), "cap": one.cap, "wanted": one.wanted}
            results.append(result)
            if "--table" not in arguments:
                print(json.dumps(result), flush=True)
    if "--table" in arguments:
        print("| kernel | " + " | ".join(f"sm_{t}" for t in TARGETS) + " | cap |\n|---|" + "---|" * (len(TARGETS) + 1))
        for one in cases():
            used = {r["target"]: str(r["registers"]) for r in results if r["kernel"] == one.name}
            print(f"| `{one.name}` | {' | '.join(used.get(t, '') for t in TARGETS)} | {one.cap} |")


if __name__ == "__main__":
    main(sys.argv[1:])
