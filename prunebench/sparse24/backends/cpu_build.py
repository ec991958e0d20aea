"""Compile the CPU kernels on the machine that runs them, once, and load them.

The compiler is called directly: the functions have plain C arguments, so that the library depends
neither on torch's headers, which take half a minute to compile, nor on its version. It is cached by
the hash of the source, the flags and the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from prunebench.errors import PrunebenchError

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
HEADER = SOURCE.with_name("cpu_vectors.h")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi2")))
_SECONDS = 600.0  # for the compiler, which takes three on an idle machine

INSTRUCTION_SETS = {
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": (),  # part of every 64-bit Arm
    "portable": (),
}
"""Flags of the compiler by instruction set, the fastest of each architecture first."""


class NoKernels(PrunebenchError):
    """The kernels cannot be compiled or loaded here."""


class MatrixArguments(ctypes.Structure):
    """`Sparse24Matrix` of the source: the addresses and sizes of one matrix."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("mask_stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


@dataclass(frozen=True)
class Kernels:
    """The loaded library.

    Attributes:
        library: Its functions, see the end of the source.
        instructions: The instruction set for which it was compiled.
        has_threads: Whether the compiler has OpenMP; without it, one thread computes.
    """

    library: ctypes.CDLL
    instructions: str
    has_threads: bool


@functools.cache
def kernels() -> Kernels | str:
    """Return the kernels of this machine, or why there are none; that is also said, once."""
    try:
        return build(best_instructions())
    except NoKernels as error:
        why = f"{error.what}: {error.where}"
        warnings.warn(f"2:4 runs by `reference` on this CPU, slowly: {why}", stacklevel=2)
        return why


def best_instructions() -> str:
    """Return the name of the best instruction set of this CPU that has kernels."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "neon"
    has = _capabilities()
    if not (has.get("avx2") and has.get("fma3") and has.get("f16c")):
        return "portable"
    if not all(has.get(f"avx512_{part}") for part in ("f", "bw", "vl", "dq", "vbmi2")):
        return "avx2"
    return "avx512_bf16" if has.get("avx512_bf16") else "avx512"


def _capabilities() -> dict[str, bool]:
    """Return the instructions of this x86 CPU by name; empty for another one."""
    get = getattr(torch.cpu, "get_capabilities", None)
    if get is not None:
        return dict(get())
    # An older torch: the name of the widest set that torch itself uses.
    widest = torch.backends.cpu.get_cpu_capability()
    return dict.fromkeys(("avx2", "fma3", "f16c"), widest in ("AVX2", "AVX512"))


def cpu_name() -> str:
    """Return the model of this CPU, or its architecture."""
    get = getattr(torch.cpu, "get_capabilities", None)
    return str(get().get("cpu_name", "") if get is not None else "") or platform.machine()


def build(instructions: str) -> Kernels:
    """Compile the kernels for an instruction set, unless they are in the cache, and load them.

    Raises:
        NoKernels: There is no compiler, it fails (its last line is in the error), or what it wrote
            cannot be loaded.
    """
    compiler = find_compiler()
    flags = (*_FLAGS, *INSTRUCTION_SETS[instructions])
    path = _library_path(compiler, flags)
    cached = path.is_file()
    if not cached:
        _compile(compiler, flags, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)
        if cached:  # a damaged file
            return build(instructions)
        raise NoKernels("the compiled CPU kernels cannot be loaded", where=str(error)) from None
    address, integer = ctypes.c_void_p, ctypes.c_int
    matrix = ctypes.POINTER(MatrixArguments)
    for name in ("sparse24_multiply", "dense16_multiply"):
        multiply = getattr(library, name)
        multiply.argtypes = (matrix, address, integer, address, address, integer)
        multiply.restype = None
    library.sparse24_unpack.argtypes = (matrix, address, integer)
    library.sparse24_unpack.restype = None
    library.read_words.argtypes = (address, ctypes.c_int64, integer)
    library.read_words.restype = ctypes.c_uint64
    return Kernels(library, instructions, bool(library.has_threads()))


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: `$CXX`, or the first that is installed.

    Raises:
        NoKernels: There is none.
    """
    named = os.environ.get("CXX")
    command = shlex.split(named) if named else []
    names = command[:1] if command else _COMPILERS
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return [path, *command[1:]]
    where = f"CXX is {named}" if named else f"none of {', '.join(_COMPILERS)} is installed"
    raise NoKernels("no C++ compiler", where=where, fix="install g++, or name one in CXX")


def library_folder() -> Path:
    """Return where compiled kernels are cached."""
    # Imported here: `benchmarks.gpu_acceptance` runs on machines that have torch and little else.
    from prunebench.files import cache_dir

    return cache_dir() / "kernels"


def _library_path(compiler: list[str], flags: tuple[str, ...]) -> Path:
    digest = hashlib.sha256(SOURCE.read_bytes() + HEADER.read_bytes())
    # The version of the compiler: another one may fail, or make other code.
    facts = (*compiler, _version(compiler), *flags, sys.platform, platform.machine())
    digest.update("\0".join(facts).encode())
    return library_folder() / f"cpu-{digest.hexdigest()[:16]}.so"


def _version(compiler: list[str]) -> str:
    outcome = _call([*compiler, "-dumpfullversion", "-dumpversion"])
    return outcome.stdout.strip() if outcome.returncode == 0 else ""


def _compile(compiler: list[str], flags: tuple[str, ...], path: Path) -> None:
    """Compile to `path`; the file appears there whole, or not at all."""
    from prunebench.files import require_writable

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_writable(path.parent)
    except (OSError, PrunebenchError) as error:
        raise NoKernels("the CPU kernels cannot be cached", where=str(error)) from None
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / path.name
        command = [*compiler, *flags, str(SOURCE), "-o", str(output)]
        outcome = _call([*command, "-fopenmp"])
        # Clang of macOS has no OpenMP.
        if outcome.returncode:
            outcome = _call(command)
        if outcome.returncode:
            lines = outcome.stderr.strip().splitlines() or [f"exit status {outcome.returncode}"]
            raise NoKernels(f"{compiler[0]} cannot compile the CPU kernels", where=lines[-1][:300])
        output.replace(path)


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS, errors="replace"
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"stopped after {_SECONDS:.0f} s")
