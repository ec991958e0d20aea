"""Compile Kernel A for chips that are not here: `python -m tests.scripts.compile_kernels 80 90`.

Triton brings its own assembler, so that a machine without a GPU can make the machine code.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunebench.sparse24.backends import triton_kernels as kernels

POINTERS = {"words": "*i32", "meta": "*i16", "x": "*bf16", "bias": "*bf16", "out": "*bf16"}
NUMBERS = dict.fromkeys(("n", "k", "tokens", "supers", "size"), "i32")
TILE = {"BN": 32, "LANES": 16, "STEPS": 4}
PRODUCT = {**TILE, "SPLIT": 2, "HAS_BIAS": True, "WIDE": False}
CASES = (
    (kernels._dot_kernel, {**PRODUCT, "BT": 16}, {"out": "*fp32"}),
    (kernels._dot_kernel, {**PRODUCT, "BT": 64, "LANES": 32, "STEPS": 2}, {"meta": "*u8"}),
    (kernels._fma_kernel, {**PRODUCT, "BT": 2}, {"out": "*fp32"}),
    (kernels._unpack_kernel, TILE, {}),
    (kernels._reduce_kernel, {"SPLIT": 2, "HAS_BIAS": True, "BLOCK": 1024}, {"parts": "*fp32"}),
)


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for function, constants, others in CASES:
            types = POINTERS | NUMBERS | others | dict.fromkeys(constants, "constexpr")
            names = list(function.arg_names)
            aligned = {
                (place,): [["tt.divisibility", 16]]
                for place, name in enumerate(names)
                if types[name].startswith("*")
            }
            source = ASTSource(
                function,
                {name: types[name] for name in names},
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs=aligned,
            )
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            line = f"{capability} {function.__name__} {len(made.asm['cubin'])} bytes"
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
