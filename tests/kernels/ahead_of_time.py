"""Compiles the kernels to machine code for several GPUs without having one, and reads what they would use.

Runs in a process of its own, without TRITON_INTERPRET. One line of JSON a kernel
and target: registers, spills, and how global memory is read and written.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVIDIA = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TARGETS = (80, 90, 100)


@dataclass
class Case:
    """One kernel with the types and constants it is launched with."""

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict
    warps: int
    cap: int
    """Registers a thread it may use."""
    wanted: dict[str, int] = field(default_factory=dict)
    """Accesses to memory it must have at least: the hot loops' vectors."""
    options: dict = field(default_factory=dict)
    targets: tuple[int, ...] = TARGETS


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([os.path.join(NVIDIA, name), *arguments], capture_output=True, text=True)
    return run.stdout + run.stderr


def compile_case(case: Case, target: int) -> dict:
    """What ptxas made of the kernel for sm_<target>."""
    arguments = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in arguments}
    # What the launcher specialises at run time: pointers on 16 bytes.
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if signature[name].startswith("*")
    }
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(arguments.index(name),): value for name, value in case.constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options={"num_warps": case.warps, **case.options}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{case.name} sm_{target}: cuobjdump gave no resource usage: {usage[-300:]}")
    registers, stack, shared, local = map(int, found.groups())
    count = {
        key: len(re.findall(pattern, assembly))
        for key, pattern in {
            "loads_16": r"\bLDG\.E\.(?:\w+\.)*128\b",
            "loads_8": r"\bLDG\.E\.(?:\w+\.)*64\b",
            "loads": r"\bLDG\b",
            "stores_16": r"\bSTG\.E\.(?:\w+\.)*128\b",
            "stores_8": r"\bSTG\.E\.(?:\w+\.)*64\b",
            "stores": r"\bSTG\b",
            "spills": r"\b(?:STL|LDL)\b",
            "atomics": r"\b(?:ATOM|ATOMG|RED)\b",
        }.items()
    }
    if not count["loads"] and not count["stores"]:
        raise RuntimeError(f"{case.name} sm_{target}: nvdisasm shows no access to memory: {assembly[:300]}")
    return {
        "kernel": case.name,
        "target": target,
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "local": local,
        **count,
    }
