"""Launches of the Triton kernels: `relaxation` and `optimize`, one layer at a time.

Imported only if Triton is installed; `dispatch` decides whether it is used.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prunebench.pruners.maskllm import triton_kernels
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation, WeightGradient

MOST = 16
"""Most candidates: loops over them are unrolled, and the 70 of 4:8 would compile for minutes."""

Kind = Literal["adamw", "momentum", "mirror"]


def takes(table: Tensor) -> bool:
    """Return whether the kernels support these candidates, [choices, M]."""
    choices, group = table.shape
    return group in (2, 4, 8) and choices <= MOST


def uniforms(
    first: int, count: int, choices: int, *, seed: int, step: int, layer: int, device: torch.device
) -> Tensor:
    """Return the uniforms of the groups from `first` on, [choices, count]; as `noise.uniforms`."""
    out = torch.empty(choices, count, device=device)
    # Philox keys are 32-bit words; `noise.philox` masks them the same way.
    key = (seed & 0xFFFFFFFF, step & 0xFFFFFFFF)
    _launch(
        triton_kernels.uniforms_kernel, out, count, (out, count, first, *key, layer), {"C": choices}
    )
    return out


def soften(layer: LayerLogits, weight: Tensor, relaxation: Relaxation, out: Tensor) -> None:
    """Write W~ = W * m into `out`, contiguous; see `LayerLogits.soften`."""
    count = layer.logits.shape[1]
    numbers = (
        count,
        *_key(layer, relaxation),
        relaxation.temperature,
        relaxation.scale,
        relaxation.noise,
    )
    _launch(
        triton_kernels.soften_kernel,
        out,
        count,
        (layer.logits, weight.contiguous(), out, *numbers),
        {"NOISY": bool(relaxation.noise), **_table(layer)},
    )


def certainty(layer: LayerLogits, relaxation: Relaxation) -> float:
    """Return the sum over the groups of the largest probability, without noise."""
    count = layer.logits.shape[1]
    parts = layer.logits.new_zeros(_programs(count), dtype=torch.float32)
    arguments = (layer.logits, parts, count, relaxation.temperature, relaxation.scale)
    _launch(triton_kernels.certainty_kernel, parts, count, arguments, {"C": len(layer.table)})
    return float(parts.sum(dtype=torch.float64))


def directions(
    layer: LayerLogits,
    weight: Tensor,
    slope: WeightGradient,
    relaxation: Relaxation,
    *,
    mirror: bool,
    part: slice,
) -> Tensor:
    """Return the gradient of the logits of some groups, [choices, part], float32."""
    size = part.stop - part.start
    out = layer.logits.new_empty(len(layer.table), size, dtype=torch.float32)
    arguments = (*_slope(layer, weight, slope, relaxation), out, part.start, part.stop)
    options = {"MIRROR": mirror, "SUM": False, **_options(layer, relaxation)}
    _launch(triton_kernels.directions_kernel, out, size, arguments, options)
    return out


def sum_squares(
    layer: LayerLogits,
    weight: Tensor,
    slope: WeightGradient,
    relaxation: Relaxation,
    *,
    mirror: bool,
) -> float:
    """Return the sum of squares of the gradient of a layer's logits."""
    count = layer.logits.shape[1]
    parts = layer.logits.new_zeros(_programs(count), dtype=torch.float32)
    arguments = (*_slope(layer, weight, slope, relaxation), parts, 0, count)
    options = {"MIRROR": mirror, "SUM": True, **_options(layer, relaxation)}
    _launch(triton_kernels.directions_kernel, parts, count, arguments, options)
    return float(parts.sum(dtype=torch.float64))


def update(
    layer: LayerLogits,
    weight: Tensor,
    slope: WeightGradient,
    relaxation: Relaxation,
    *,
    kind: Kind,
    rate: float,
    unit: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    outlier: float,
) -> None:
    """Update a layer's logits and moments in place; see `optimize.Optimizer.step`."""
    adamw, (b1, b2), count = kind == "adamw", betas, relaxation.step + 1
    first = layer.state["first"].values
    second = layer.state["second"].values if adamw else first  # not read by the others
    # Computed here in float64: b^t of a float32 would differ from plain PyTorch.
    scaled = rate / (1 - b1**count) if adamw else rate
    decay, grown = 1 - rate * weight_decay, 1 - b2**count
    numbers = (unit, scaled, decay, b1, 1 - b1, b2, 1 - b2, grown, eps, outlier)
    _launch(
        triton_kernels.update_kernel,
        layer.logits,
        layer.logits.shape[1],
        (*_slope(layer, weight, slope, relaxation), first, second, *numbers),
        {"MIRROR": kind == "mirror", "ADAMW": adamw, **_options(layer, relaxation)},
    )


def _launch(
    kernel: Any, out: Tensor, groups: int, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Launch a kernel over `groups` groups, on the device of `out`."""
    if not groups:
        return
    grid = (_programs(groups),)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        kernel[grid](
            *arguments, **options, B=triton_kernels.BLOCK, num_warps=4, enable_fp_fusion=False
        )


def _programs(groups: int) -> int:
    return -(-groups // triton_kernels.BLOCK)


def _key(layer: LayerLogits, relaxation: Relaxation) -> tuple[int, ...]:
    return layer.first, relaxation.seed & 0xFFFFFFFF, relaxation.step & 0xFFFFFFFF, layer.index


def _table(layer: LayerLogits) -> dict[str, Any]:
    choices, group = layer.table.shape
    return {"TABLE": layer.pattern, "C": choices, "M": group}


def _options(layer: LayerLogits, relaxation: Relaxation) -> dict[str, Any]:
    switches = {
        "NOISY": relaxation.noise,
        "REWARDED": relaxation.reward,
        "CURVED": relaxation.curvature,
    }
    return {name: bool(value) for name, value in switches.items()} | _table(layer)


def _slope(
    layer: LayerLogits, weight: Tensor, slope: WeightGradient, relaxation: Relaxation
) -> tuple[Tensor | int | float, ...]:
    """Return the leading arguments of all kernels that compute gradients."""
    tensors = (layer.logits, weight.contiguous(), slope.gradient, slope.rows, slope.columns)
    softness = (
        relaxation.temperature,
        relaxation.scale,
        relaxation.noise,
        relaxation.scale / relaxation.temperature,
    )
    count = layer.logits.shape[1]
    return (
        *tensors, count, layer.width, *_key(layer, relaxation), *softness, 2 * relaxation.reward,
        relaxation.curvature / 2,
    )  # fmt: skip
