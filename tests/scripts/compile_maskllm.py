"""Compile the kernels of maskllm for GPUs that need not be here: prints a line for each.

A process of its own, because Triton's interpreter is chosen when kernels are defined.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunebench.pruners.maskllm import triton_kernels
from prunebench.pruners.maskllm.candidates import candidates
from prunebench.pruners.maskllm.relaxation import LayerLogits

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
F, B = "*fp32", "*bf16"
TABLE = candidates(2, 4)
PATTERN = {"TABLE": LayerLogits(0, torch.zeros(6, 1), TABLE, 1).pattern, "C": 6, "M": 4}
SWITCHES = {"NOISY": True, "REWARDED": True, "CURVED": True, "MIRROR": False}
SLOPE = {"logits": F, "weight": B, "gradient": B, "rows": F, "columns": F}
CASES = [
    (triton_kernels.soften_kernel, {"logits": F, "weight": B, "out": B}, {"NOISY": True}),
    (triton_kernels.directions_kernel, SLOPE | {"out": F}, SWITCHES | {"SUM": True}),
    (
        triton_kernels.update_kernel,
        SLOPE | {"logits": B, "first": B, "second": B},
        SWITCHES | {"ADAMW": True},
    ),
]


def compiled(kernel, pointers, constants, capability):
    constants = {**PATTERN, **constants, "B": triton_kernels.BLOCK}
    names = [parameter.name for parameter in kernel.params]
    types = {
        name: "constexpr" if name in constants
        else pointers.get(name, "i32" if name in triton_kernels.NUMBERS else "fp32")
        for name in names
    }  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main():
    for capability in (80, 90):
        for kernel, pointers, constants in CASES:
            made = compiled(kernel, pointers, constants, capability)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(made.asm["cubin"])
                file.flush()
                tool = [TOOLS / "cuobjdump", "-res-usage", file.name]
                usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
            registers, stack, local = (
                int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
            )
            loose = "lg2.approx" in made.asm["ptx"]  # wrong where log u is near 0
            good = "no spills" if not (stack or local or loose) else "BAD"
            print(f"{kernel.__name__} sm_{capability}: {registers} registers, {good}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
