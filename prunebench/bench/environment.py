"""The environment of a speed measurement: GPU or CPU, driver, libraries, clocks, power."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

import torch

from prunebench.bench.cpu_dense import last_level_cache_bytes, memory_bytes_per_second
from prunebench.sparse24.backends.cpu_build import cpu_name, kernels
from prunebench.sparse24.backends.cusparselt import library_version

_QUERY = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"


def environment(device: torch.device) -> dict[str, Any]:
    """Return library versions, and the GPU or the CPU; None for what is missing."""
    facts: dict[str, Any] = {
        "device": device.type,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cusparselt": library_version(),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "gpu": None,
        "capability": None,
        "l2_bytes": None,
        "memory_bytes": None,
        "warnings": [],
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": gpu.name,
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "l2_bytes": getattr(gpu, "L2_cache_size", None),
            "memory_bytes": gpu.total_memory,
        }
        if facts["cusparselt"] == 800 and (gpu.major, gpu.minor) == (9, 0):
            facts["warnings"].append(
                "cuSPARSELt 0.8.0 is known to be slow on H100 (fixed in 0.8.1)"
            )
    if device.type == "cpu":
        facts |= _cpu()
    return facts


def _cpu() -> dict[str, Any]:
    loaded = kernels()
    rate = memory_bytes_per_second()
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instructions": None if isinstance(loaded, str) else loaded.instructions,
        "l3_bytes": last_level_cache_bytes(),
        # Of the whole machine at the end of the bench: what a product cannot exceed.
        "read_bytes_per_second": rate,
    }


def clocks(device: torch.device) -> dict[str, str] | None:
    """Return the current clocks and power limit from nvidia-smi; None without it."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    command += ["-i", str(device.index or 0)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in process.stdout.strip().split(",")]
    names = _QUERY.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
