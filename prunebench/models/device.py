"""Devices of a `--device` value, and dtypes that a CPU only emulates."""

from __future__ import annotations

from pathlib import Path

import torch

from prunebench.errors import MissingResource, UsageError

_CPU_FACTS = Path("/proc/cpuinfo")
_NATIVE_FLAGS = {  # of /proc/cpuinfo; the last one is of ARM
    torch.bfloat16: ("avx512_bf16", "amx_bf16", " bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", " fphp"),
}


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool | None:
    """Return True if the CPU emulates this dtype, None if unknown."""
    flags = _NATIVE_FLAGS.get(dtype)
    if device.type != "cpu" or flags is None:
        return False
    if not _CPU_FACTS.is_file():
        return None
    facts = _CPU_FACTS.read_text("utf-8")
    return not any(flag in facts for flag in flags)


def choose_devices(names: str) -> tuple[torch.device, ...]:
    """Return the devices of a `--device` value: one, or several GPUs separated by commas.

    Raises:
        UsageError: No such type of device, or several that are not different GPUs of the same
            model: GPUs round differently, and the result would depend on where a batch ran.
        MissingResource: This machine has no such device.
    """
    devices = tuple(choose_device(name.strip()) for name in names.split(","))
    if len(devices) == 1:
        return devices
    fix = "name different GPUs of one kind, as in --device cuda:0,cuda:1"
    # `cuda` without a number has no index: it may be the same GPU as `cuda:0`.
    indices = {device.index for device in devices if device.type == "cuda"} - {None}
    if len(indices) < len(devices):
        raise UsageError(f"{names!r} are not different GPUs", fix=fix)
    kinds = {torch.cuda.get_device_name(device) for device in devices}
    if len(kinds) > 1:
        raise UsageError(f"{names!r} are different: {', '.join(sorted(kinds))}", fix=fix)
    return devices


def choose_device(name: str) -> torch.device:
    """Return the device of a `--device` value; `auto` is CUDA if available, else the CPU.

    Raises:
        UsageError: No such type of device, or one without float64, in which statistics are summed.
        MissingResource: This machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused below
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", fix="use auto, cpu, cuda or cuda:0")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise MissingResource(
            f"device {name} is not available",
            where=f"this machine has the cpu and {count} CUDA devices",
            fix="use --device auto or --device cpu",
        )
    return device


def make_current(device: torch.device) -> None:
    """Make a GPU the current one, on which streams, graphs, events and some libraries work.

    `cuda` without a number is the current one already.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
