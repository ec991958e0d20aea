"""Whether Triton's kernels run a layer: on CUDA, where they are there and have proved themselves.

The first time that a device is used, the kernels' noise is compared with plain torch's bit for bit.
Where Triton is missing, cannot compile, or makes other noise, plain torch does the work, and a
warning says so. PRUNEBENCH_TRITON=0 forces plain torch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from prunebench.pruners.maskllm import noise


def kernels_for(logits: Tensor, table: Tensor) -> ModuleType | None:
    """Return the kernels if they can run on these tensors, else None.

    Args:
        logits: (choices, groups).
        table: The candidates, (choices, group).
    """
    if not proven(logits.device):
        return None
    from prunebench.pruners.maskllm import launch

    return launch if launch.takes(table) else None


@functools.cache
def proven(device: torch.device) -> bool:
    """Return whether the kernels run on a device and make the same noise as plain torch."""
    wanted = device.type == "cuda" and os.environ.get("PRUNEBENCH_TRITON") != "0"
    if not wanted or not importlib.util.find_spec("triton"):
        return False
    try:
        why = fault(device)
    except Exception as problem:  # what a compiler, driver or launch can raise has no common type
        why = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
    if why:
        warnings.warn(f"maskllm runs in plain torch on {device}: {why}", stacklevel=2)
    return not why


def fault(device: torch.device) -> str:
    """Return what is wrong with the kernels' noise on a device, or nothing."""
    from prunebench.pruners.maskllm import launch

    key = {"seed": 3141592653, "step": 2718281828, "layer": 57}
    for first, choices in ((0, 6), ((1 << 32) - 100, 13)):
        index = torch.arange(first, first + 200, device=device)
        expected = noise.uniforms(index, choices, **key)
        found = launch.uniforms(first, 200, choices, **key, device=device)
        if not torch.equal(found, expected):
            return "the noise of the kernels is not that of plain torch"
    return ""
