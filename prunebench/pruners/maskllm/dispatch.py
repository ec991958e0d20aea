"""Select Triton kernels or plain PyTorch.

Kernels are used on CUDA after their noise has been checked bit for bit against plain PyTorch, once
per device. If Triton cannot compile or its noise differs, plain PyTorch is used, with a warning; if
Triton is not installed, without one. PRUNEBENCH_TRITON=0 forces plain PyTorch.
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
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation


def soften(layer: LayerLogits, weight: Tensor, relaxation: Relaxation, out: Tensor) -> None:
    """Write the relaxed weight W~ = W * m into `out`; see `LayerLogits.soften`.

    Args:
        layer: The logits.
        weight: W, [out, in].
        relaxation: Temperature, scale and noise of this step.
        out: W~, [out, in], of any floating dtype.
    """
    kernels = kernels_for(layer.logits, layer.table)
    if kernels is not None:
        kernels.soften(layer, weight, relaxation, out)
    else:
        layer.soften(weight, relaxation, out)


def certainty(layer: LayerLogits, relaxation: Relaxation) -> float:
    """Return the sum over the groups of the largest probability, without noise."""
    kernels = kernels_for(layer.logits, layer.table)
    if kernels is not None:
        return float(kernels.certainty(layer, relaxation))
    return layer.certainty(relaxation)


def kernels_for(logits: Tensor, table: Tensor) -> ModuleType | None:
    """Return the kernels if they can run on these tensors, else None.

    Args:
        logits: [choices, groups].
        table: The candidates, [choices, M].
    """
    if not kernels_match_torch(logits.device):
        return None
    from prunebench.pruners.maskllm import triton_ops

    return triton_ops if triton_ops.takes(table) else None


@functools.cache
def kernels_match_torch(device: torch.device) -> bool:
    """Return whether the kernels run on a device and make the same noise as plain torch."""
    enabled = device.type == "cuda" and os.environ.get("PRUNEBENCH_TRITON") != "0"
    if not enabled or not importlib.util.find_spec("triton"):
        return False
    try:
        why = kernel_mismatch(device)
    except Exception as error:  # compiler, driver and launch errors have no common base class
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if why:
        warnings.warn(f"maskllm runs in plain torch on {device}: {why}", stacklevel=2)
    return not why


def kernel_mismatch(device: torch.device) -> str:
    """Return how the kernels' noise differs from that of plain PyTorch; empty if it does not."""
    from prunebench.pruners.maskllm import triton_ops

    key = {"seed": 3141592653, "step": 2718281828, "layer": 57}
    # one block of the counter, and three that cross a 32-bit boundary of the group index
    for first, choices in ((0, 6), ((1 << 32) - 100, 13)):
        index = torch.arange(first, first + 200, device=device)
        expected = noise.uniforms(index, choices, **key)
        actual = triton_ops.uniforms(first, 200, choices, **key, device=device)
        # Exact: a training must not depend on which of the two makes its noise.
        if not torch.equal(actual, expected):
            return "the noise of the kernels is not that of plain torch"
    return ""
