"""Compile the kernels of 2:4 for chips that are not here, and count their machine code.

    python -m tests.scripts.compile_kernels [all]

Triton brings assembler and disassembler, so that a machine without a GPU can read what a GPU would
run. Prints a JSON list, one `Counts` per kernel and chip. A process of its own, because Triton's
interpreter is chosen when kernels are defined.
"""

import collections
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunebench.sparse24.backends import triton_kernels as kernels
from prunebench.sparse24.backends.triton import LANES, STEPS, SUPER, Launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CHIPS = (80, 89, 90, 100)
ROWS = 16
SHAPE = (11008, 4096)
# Pipelines of their own, at half of the rate of additions and multiplications in float32 or less.
INTEGER = {
    "BFE", "BMSK", "IADD", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL",
    "SHF", "VIADD",
}  # fmt: skip
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.M)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the machine code of a kernel is made of.

    Attributes:
        words: Words of two values that a thread multiplies in a turn of its loop.
        loop: Instructions of such a turn.
        integer: Those among them of the integer pipelines.
        asynchronous: Copies from global to shared memory in it that no thread waits for.
        direct: Loads from global memory to registers in it, which threads do wait for.
        spilled: Bytes of local memory of a thread.
        shared: Bytes of shared memory of a block.
    """

    kernel: str
    chip: int
    tokens: int
    dtype: str
    words: int
    loop: int
    integer: int
    asynchronous: int
    direct: int
    spilled: int
    registers: int
    shared: int


def main() -> None:
    cases = [("bf16", 1, chip) for chip in CHIPS] + [("bf16", 4, 90), ("fp16", 1, 90)]
    if sys.argv[1:] == ["all"]:
        cases = [(dtype, n, c) for dtype in ("bf16", "fp16") for n in (1, 2, 3, 4) for c in CHIPS]
    counts = [product(*case, Launch()) for case in cases]
    if sys.argv[1:] == ["all"]:
        counts += [product("bf16", 1, chip, Launch(8, 8)) for chip in CHIPS]
    counts += [unpacking(90)]
    sys.stdout.write(json.dumps([dataclasses.asdict(count) for count in counts], indent=1) + "\n")


def product(dtype: str, tokens: int, chip: int, launch: Launch, shape=SHAPE) -> Counts:
    """Compile the product for a shape (out, in), as Triton would at its first call."""
    rows, width = shape
    pointers = {"words": "*i32", "meta": "*i16", "x": "*i64"}
    pointers |= {"bias": f"*{dtype}", "out": f"*{dtype}"}
    numbers = {"n": rows, "groups": width // 4, "supers": width // SUPER, "stride": width // 4}
    constants = {
        "BN": ROWS, "PARTS": launch.parts, "TOKENS": tokens, "HAS_BIAS": True,
        "STAGES": launch.stages, "INTERPRETED": False,
    }  # fmt: skip
    made = compiled(kernels.multiply_kernel, pointers, numbers, constants, chip, launch.warps)
    words = launch.parts * STEPS * ROWS * LANES // (32 * launch.warps)
    return counted(made, "multiply", chip, tokens, dtype, words)


def unpacking(chip: int) -> Counts:
    """Compile the kernel that unpacks, which has no loop."""
    pointers = {"words": "*i32", "meta": "*i16", "out": "*i64"}
    numbers = {"n": 11008, "groups": 1024, "supers": 16}
    made = compiled(kernels.unpack_kernel, pointers, numbers, {"BN": ROWS}, chip, 4)
    return counted(made, "unpack", chip, 0, "bf16", STEPS * ROWS * LANES // 128)


def compiled(function, pointers, numbers, constants, chip, warps):
    """Compile with the assumptions that Triton makes from arguments: what 16 divides."""
    names = list(function.arg_names)
    aligned = {*pointers, *(name for name, number in numbers.items() if number % 16 == 0)}
    types = pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        function,
        {name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def counted(made, kernel: str, chip: int, tokens: int, dtype: str, words: int) -> Counts:
    """Disassemble a kernel and count the instructions of its longest loop, or all without one."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-sass", "-res-usage")
        )
    lines = [(int(place, 16), name, rest) for place, name, rest in INSTRUCTION.findall(code)]
    loop = longest_loop(lines) or lines
    names = collections.Counter(name.split(".")[0] for _, name, _ in loop)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return Counts(
        kernel, chip, tokens, dtype, words, len(loop),
        sum(number for name, number in names.items() if name in INTEGER),
        names["LDGSTS"], names["LDG"], stack + local, registers, made.metadata.shared,
    )  # fmt: skip


def longest_loop(lines):
    """Return the instructions from the target of a backward branch to the branch."""
    loops = [[]]
    for place, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < place:
            loops.append([line for line in lines if int(target[1], 16) <= line[0] <= place])
    return max(loops, key=len)


if __name__ == "__main__":
    main()
