"""Calls of the Triton kernels: what `relax` and `optimise` do in plain torch, a layer at a time.

Imported only where Triton is there, and used where `fused` says so.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prunebench.pruners.maskllm import kernels
from prunebench.pruners.maskllm.relax import LayerLogits, Relaxation, Slope

MOST = 16
"""Candidates that are unrolled. The 70 of 4:8 would take minutes to compile: plain torch."""

Kind = Literal["adamw", "momentum", "mirror"]


def takes(table: Tensor) -> bool:
    """Return whether there are kernels for candidates like these."""
    choices, group = table.shape
    return group in (2, 4, 8) and choices <= MOST


def uniforms(
    first: int, count: int, choices: int, *, seed: int, step: int, layer: int, device: torch.device
) -> Tensor:
    """Return the uniforms of the groups from `first` on, (choices, count): those of `noise`."""
    out = torch.empty(choices, count, device=device)
    key = (seed & 0xFFFFFFFF, step & 0xFFFFFFFF)
    _launch(kernels.uniforms_kernel, out, count, (out, count, first, *key, layer), {"C": choices})
    return out


def soften(layer: LayerLogits, weight: Tensor, how: Relaxation, out: Tensor) -> None:
    """Write W~ = W * m into `out`, contiguous; see `LayerLogits.soften`."""
    count = layer.logits.shape[1]
    numbers = (count, *_key(layer, how), how.temperature, how.scale, how.noise)
    _launch(
        kernels.soften_kernel,
        out,
        count,
        (layer.logits, weight.contiguous(), out, *numbers),
        {"NOISY": bool(how.noise), **_table(layer)},
    )


def certainty(layer: LayerLogits, how: Relaxation) -> float:
    """Return the sum over the groups of the largest probability, without noise."""
    count = layer.logits.shape[1]
    parts = layer.logits.new_zeros(_programs(count), dtype=torch.float32)
    arguments = (layer.logits, parts, count, how.temperature, how.scale)
    _launch(kernels.certainty_kernel, parts, count, arguments, {"C": len(layer.table)})
    return float(parts.sum(dtype=torch.float64))


def directions(
    layer: LayerLogits, weight: Tensor, slope: Slope, how: Relaxation, *, mirror: bool, part: slice
) -> Tensor:
    """Return the direction of ascent of some groups, (choices, part), float32."""
    size = part.stop - part.start
    out = layer.logits.new_empty(len(layer.table), size, dtype=torch.float32)
    arguments = (*_slope(layer, weight, slope, how), out, part.start, part.stop)
    options = {"MIRROR": mirror, "SUM": False, **_options(layer, how)}
    _launch(kernels.directions_kernel, out, size, arguments, options)
    return out


def sum_squares(
    layer: LayerLogits, weight: Tensor, slope: Slope, how: Relaxation, *, mirror: bool
) -> float:
    """Return the sum of squares of a layer's direction."""
    count = layer.logits.shape[1]
    parts = layer.logits.new_zeros(_programs(count), dtype=torch.float32)
    arguments = (*_slope(layer, weight, slope, how), parts, 0, count)
    options = {"MIRROR": mirror, "SUM": True, **_options(layer, how)}
    _launch(kernels.directions_kernel, parts, count, arguments, options)
    return float(parts.sum(dtype=torch.float64))


def update(
    layer: LayerLogits,
    weight: Tensor,
    slope: Slope,
    how: Relaxation,
    *,
    kind: Kind,
    rate: float,
    unit: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    outlier: float,
) -> None:
    """Change a layer's logits and moments in place; see `optimise.Optimizer.step`."""
    adamw, (b1, b2), count = kind == "adamw", betas, how.step + 1
    first = layer.state["first"].values
    second = layer.state["second"].values if adamw else first
    scaled = rate / (1 - b1**count) if adamw else rate
    decay, grown = 1 - rate * weight_decay, 1 - b2**count
    numbers = (unit, scaled, decay, b1, 1 - b1, b2, 1 - b2, grown, eps, outlier)
    _launch(
        kernels.update_kernel,
        layer.logits,
        layer.logits.shape[1],
        (*_slope(layer, weight, slope, how), first, second, *numbers),
        {"MIRROR": kind == "mirror", "ADAMW": adamw, **_options(layer, how)},
    )


def _launch(
    kernel: Any, out: Tensor, groups: int, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Run a kernel over some groups, on the device of `out`."""
    if not groups:
        return
    grid = (_programs(groups),)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        kernel[grid](*arguments, **options, B=kernels.BLOCK, num_warps=4, enable_fp_fusion=False)


def _programs(groups: int) -> int:
    return -(-groups // kernels.BLOCK)


def _key(layer: LayerLogits, how: Relaxation) -> tuple[int, ...]:
    return layer.first, how.seed & 0xFFFFFFFF, how.step & 0xFFFFFFFF, layer.index


def _table(layer: LayerLogits) -> dict[str, Any]:
    choices, group = layer.table.shape
    return {"TABLE": layer.pattern, "C": choices, "M": group}


def _options(layer: LayerLogits, how: Relaxation) -> dict[str, Any]:
    switches = {"NOISY": how.noise, "REWARDED": how.reward, "CURVED": how.curvature}
    return {name: bool(value) for name, value in switches.items()} | _table(layer)


def _slope(
    layer: LayerLogits, weight: Tensor, slope: Slope, how: Relaxation
) -> tuple[Tensor | int | float, ...]:
    """Return the arguments that every kernel for gradients begins with."""
    tensors = (layer.logits, weight.contiguous(), slope.gradient, slope.rows, slope.columns)
    softness = (how.temperature, how.scale, how.noise, how.scale / how.temperature)
    count = layer.logits.shape[1]
    return (
        *tensors, count, layer.width, *_key(layer, how), *softness, 2 * how.reward,
        how.curvature / 2,
    )  # fmt: skip
