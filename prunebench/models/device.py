"""Which devices a `--device` value names, and which dtypes they only emulate."""

from __future__ import annotations

from pathlib import Path

import torch

from prunebench.errors import MissingResource, UsageError

_CPU_FACTS = Path("/proc/cpuinfo")
_OWN_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", " bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", " fphp"),
}


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool | None:
    """Whether a CPU has no instructions for a dtype; None where that cannot be told."""
    flags = _OWN_INSTRUCTIONS.get(dtype)
    if device.type != "cpu" or flags is None:
        return False
    if not _CPU_FACTS.is_file():
        return None
    facts = _CPU_FACTS.read_text("utf-8")
    return not any(flag in facts for flag in flags)


def choose_devices(names: str) -> tuple[torch.device, ...]:
    """Return the devices for a `--device` value: one, or several GPUs between commas.

    Raises:
        UsageError: No such kind of device, or several that are not different GPUs of one kind:
            another chip rounds otherwise, and the result would depend on where a batch ran.
        MissingResource: A device is not in this machine.
    """
    devices = tuple(choose_device(name.strip()) for name in names.split(","))
    if len(devices) == 1:
        return devices
    fix = "name different GPUs of one kind, as in --device cuda:0,cuda:1"
    if len({one.index for one in devices if one.type == "cuda" and one.index is not None}) < len(
        devices
    ):
        raise UsageError(f"{names!r} are not different GPUs", fix=fix)
    kinds = {torch.cuda.get_device_name(one) for one in devices}
    if len(kinds) > 1:
        raise UsageError(f"{names!r} are different: {', '.join(sorted(kinds))}", fix=fix)
    return devices


def choose_device(name: str) -> torch.device:
    """Return the device for a `--device` value; `auto` takes CUDA, else the CPU.

    Raises:
        UsageError: No such kind of device, or one without float64, in which statistics are summed.
        MissingResource: The device is not in this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
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
