"""Fake CUDA: code for GPUs runs on a machine without one, and wrong devices are errors.

A small library tells a CPU build of torch that there are two CUDA devices, and FakeTensorMode
propagates devices, dtypes and shapes of tensors that have no data, autograd included. What is
checked: that no operation mixes devices or dtypes, and where the host waits for a device (`reads`).
Values are not computed: see `device.FakeCuda` for what the host reads.

The library is registered for a whole process, so it is loaded in processes of their own:

    python -m tests.fake_cuda.walks prune/llama/wanda/2:4/joint/1      walks, one JSON line each
    python -m tests.fake_cuda benchmarks.gpu_acceptance.child ...      any module, as `python -m`

In a script of your own: `load()` before `import torch`, then `with FakeCuda() as fake:`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
ROOT = Path(__file__).parents[2]


def library() -> Path:
    """Return the compiled library; it is compiled once per machine, torch and source.

    Raises:
        RuntimeError: There is no g++, or it fails.
    """
    torch = _torch()
    key = f"{importlib.metadata.version('torch')} {torch} {SOURCE.read_text('utf-8')}"
    folder = Path(tempfile.gettempdir()) / f"prunebench-fake-cuda-{os.getuid()}"
    target = folder / f"guard-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("fake CUDA needs g++, and none is here (apt-get install g++)")
    folder.mkdir(mode=0o700, exist_ok=True)
    # another process may compile it at the same time: the last one to rename wins
    part = target.with_suffix(f".{os.getpid()}.so")
    headers, libraries = torch / "include", torch / "lib"
    line = [
        compiler, "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{headers}", str(SOURCE),
        "-o", str(part), f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ failed on {SOURCE}:\n{done.stderr[-2000:]}")
    part.rename(target)
    return target


def load() -> None:
    """Load the library into this process, before torch.

    Raises:
        RuntimeError: torch is imported already, or the library cannot be compiled.
    """
    if "torch" in sys.modules:
        raise RuntimeError("load fake CUDA before torch is imported: torch asks for CUDA once")
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")  # finds it without importing it
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
