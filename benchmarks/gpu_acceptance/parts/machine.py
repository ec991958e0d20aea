"""What the machine is: versions, what is missing, the ceilings of memory and of matrix products."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu_acceptance.measure import clock_of
from benchmarks.gpu_acceptance.record import Recorder, one_line
from prunebench.bench.environment import clocks, environment
from prunebench.bench.timing import interleaved
from prunebench.sparse24.backends.protocol import MIN_CAPABILITY

_SAME_NAME = (
    "numpy", "jaxtyping", "safetensors", "tqdm", "huggingface_hub", "tokenizers", "psutil",
    "filelock", "transformers", "greenlet", "pydantic", "platformdirs",
)  # fmt: skip
NEEDED = {name: name for name in _SAME_NAME} | {
    "pydantic_core": "pydantic-core", "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
}  # fmt: skip
"""Modules that the parts import, and the packages that they come in."""

_MATMUL = 8192
_COPY_BYTES = 4 << 30


def run(record: Recorder) -> None:
    """Say what the machine is and what it lacks; measure its ceilings."""
    reason = "" if record.dry else why_no_cuda()
    device = torch.device("cpu") if reason else record.device
    facts = environment(device)
    if record.dry:  # of a CPU, how fast its memory is read: a dry run measures no speed
        facts.pop("read_bytes_per_second", None)
    record.add("environment", **facts, needed=_versions())
    for problem in problems(reason, dry=record.dry):
        record.add("problem", **problem)
    if reason:
        return
    record.add("clocks", when="before", **(clocks(device) or {}))
    with record.step("ceilings", need=5):
        _ceilings(record)


def after(record: Recorder) -> None:
    """Say the clocks after the run: a GPU that was throttled shows in the difference."""
    record.add("clocks", when="after", **(clocks(record.device) or {}))


def why_no_cuda() -> str:
    """Return why there is no GPU to measure on, one line; "" if there is one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.zeros(1, device="cuda").item()
    except (RuntimeError, AssertionError) as error:  # no driver, an old one, no device, a dead one
        return one_line(error)
    return ""


def problems(no_cuda: str, *, dry: bool) -> list[dict[str, Any]]:
    """Return what the machine lacks: why, what that costs, and whether nothing can run."""
    found: list[tuple[str, str, bool]] = []
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            cost = f"carry the wheel of {package}: parts that import {module} fail"
            found.append((f"{package} is not installed", cost, False))
    if no_cuda:
        found.append((no_cuda, "nothing can be measured", True))
    elif not dry:
        found += _of_gpus()
    return [{"why": why, "costs": costs, "fatal": fatal} for why, costs, fatal in found]


def _of_gpus() -> list[tuple[str, str, bool]]:
    found: list[tuple[str, str, bool]] = []
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    if len(set(names)) > 1:
        found.append((f"GPUs of different kinds: {', '.join(names)}", "only cuda:0 is used", False))
    major, minor = torch.cuda.get_device_capability(0)
    if (major, minor) < MIN_CAPABILITY:
        cost = "no kernel reads packed weights: they are unpacked for each product"
        found.append((f"the chip is sm_{major}{minor}, below sm_80", cost, False))
    built = torch.cuda.get_arch_list()
    if built and not any(arch.startswith(f"sm_{major}") for arch in built):
        cost = "torch may fail in every kernel"
        found.append((f"torch is built for {', '.join(built)}, not sm_{major}{minor}", cost, False))
    if not hasattr(torch, "_cslt_compress"):
        cost = "cuSPARSELt is not measured"
        found.append((f"torch {torch.__version__} has no cuSPARSELt operators", cost, False))
    elif not torch.backends.cusparselt.is_available():
        found.append(("cuSPARSELt cannot be loaded", "cuSPARSELt is not measured", False))
    if importlib.util.find_spec("triton") is None:
        cost = "no kernel of ours is measured: decode and MaskLLM run in plain torch"
        found.append(("triton is not installed", cost, False))
    return found


def _versions() -> dict[str, str | None]:
    from importlib import metadata

    versions: dict[str, str | None] = {}
    for package in NEEDED.values():
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _ceilings(record: Recorder) -> None:
    """Measure what the memory and the tensor cores of this chip reach."""
    size = 1 << 20 if record.dry else _COPY_BYTES
    source = torch.empty(size, dtype=torch.uint8, device=record.device)
    target = torch.empty_like(source)
    wide = 64 if record.dry else _MATMUL
    left, right = (
        torch.randn(wide, wide, device=record.device, dtype=torch.bfloat16) for _ in range(2)
    )
    clock = clock_of(dry=record.dry)
    rivals = {"copy": [lambda: target.copy_(source)], "matmul": [lambda: left @ right]}
    timings = interleaved(rivals, clock, blocks=5)
    if clock.measures_speed:
        record.add("ceiling", what="copy", bytes_per_second=2 * size / timings.median("copy"))
        flops = 2 * wide**3 / timings.median("matmul")
        record.add("ceiling", what=f"matmul of {wide}, bfloat16", flops=flops)


def sanitizer(command: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run Python code under compute-sanitizer, which finds accesses outside of memory."""
    words = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    return subprocess.run(
        [*words, sys.executable, "-c", command], capture_output=True, text=True, check=False,
        timeout=seconds, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
