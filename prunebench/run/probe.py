"""A small measured probe: memory and time of a method, speed of the machine.

The method prunes random matrices of two widths. Its peak is counted (`models.footprint`) and laid
out as a * weights + b * width^2; its time as a power of the width. The machine multiplies one
matrix of the model's size, and reads a piece of its files. All of it takes a few seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunebench.calibration.stats import StatsAccumulator
from prunebench.models.footprint import Footprint
from prunebench.models.linears import Linear
from prunebench.models.walker import LinearGroup
from prunebench.pruners.layer import GroupPruner
from prunebench.sparsity import Sparsity

# the larger is twice the smaller, so that log2 of the ratio of times is the exponent
_WIDTHS = (256, 512)
_READ_BYTES = 64 << 20
_TOKENS = 512


@dataclass(frozen=True)
class MethodCost:
    """Memory and time of pruning a matrix, beyond its weights and statistics.

    Attributes:
        per_weight: Bytes for each weight of the group that is worked on.
        per_square: Bytes for each entry of a width x width matrix.
        seconds: Of one square matrix of the larger width that was tried.
        exponent: How the time grows with the width of a square matrix.
    """

    per_weight: float
    per_square: float
    seconds: float
    exponent: float

    def peak(self, out_features: int, width: int) -> int:
        """Return the bytes for a group of linears with `out_features` rows in all."""
        return round(self.per_weight * out_features * width + self.per_square * width * width)

    def time(self, out_features: int, width: int) -> float:
        """Return the seconds for a group, from the exponent: linear in the rows."""
        square = self.seconds * (width / _WIDTHS[1]) ** self.exponent
        return float(square * out_features / width)


@dataclass(frozen=True)
class Machine:
    """Speed of the machine: multiply-adds per second in the run's dtype, bytes read per second."""

    flops: float
    read_bytes: float


def probe_method(pruner: GroupPruner, sparsity: Sparsity, device: torch.device) -> MethodCost:
    """Measure a method on small random matrices."""
    small, large = _WIDTHS
    # square: a * w^2 + b * w^2; tall: a * 2w^2 + b * w^2. Their difference is a * w^2
    square, at_small = _prune(pruner, sparsity, small, small, device)
    tall, _ = _prune(pruner, sparsity, 2 * small, small, device)
    # the first call pays for kernels, workspaces and thread pools, and would raise the exponent
    _prune(pruner, sparsity, large, large, device)  # warm
    _, at_large = _prune(pruner, sparsity, large, large, device)
    per_weight = max(0.0, (tall - square) / (small * small))
    per_square = max(0.0, square / (small * small) - per_weight)
    # kept between 1 and 3, as it is extrapolated to widths of thousands and so short a measurement
    # is noisy; a factorization grows with w^3
    exponent = min(3.0, max(1.0, math.log2(max(at_large, 1e-6) / max(at_small, 1e-6))))
    return MethodCost(per_weight, per_square, at_large, exponent)


def _prune(
    pruner: GroupPruner, sparsity: Sparsity, rows: int, width: int, device: torch.device
) -> tuple[int, float]:
    """Return the peak bytes and the seconds of pruning one random matrix."""
    # a generator of its own: the run's random numbers must not depend on whether it was probed
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(width, rows, bias=False, device=device).requires_grad_(False)
    module.weight.copy_(torch.randn(rows, width, generator=generator))  # [rows, width]
    linear = Linear("probe", "probe.weight", 0, module, "weight", rows, width)
    stats = None
    if pruner.needs.calibration:
        accumulator = StatsAccumulator(hessian=pruner.needs.hessian)
        # [tokens, width]; more tokens than width, so that the Gram matrix has full rank
        accumulator.add(torch.randn(4 * width, width, generator=generator).to(device))
        stats = accumulator.result(samples=4, width=width, device=device)
    group = LinearGroup((linear,), stats)
    start_time = time.perf_counter()
    # counts tensors that are created inside: neither the weights nor the statistics
    with Footprint() as footprint:
        for new in pruner.prune_group(group, {linear.name: sparsity}):
            linear.write(new.weight)
    # kernels run asynchronously: without this the clock would stop before the work is done
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return footprint.peak, time.perf_counter() - start_time


def probe_machine(
    linears: Sequence[Linear], dtype: torch.dtype, device: torch.device, file: Path
) -> Machine:
    """Multiply a matrix of the model's size, and read a piece of its files."""
    # as a rule the first blocks have the shapes of all others
    linear = max(linears[:16], key=lambda linear: linear.size)
    # at most 4096: large enough for full speed, small enough for a moment on a CPU
    rows, width = min(linear.out_features, 4096), min(linear.in_features, 4096)
    weight = torch.ones(rows, width, dtype=dtype, device=device)  # [rows, width]
    tokens = torch.ones(_TOKENS, width, dtype=dtype, device=device)  # [tokens, width]
    seconds = []
    for _ in range(3):
        start_time = time.perf_counter()
        nn.functional.linear(tokens, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start_time)
    # multiply-adds, not floating-point operations: half of what vendors count; the fastest of
    # three, as anything slower was disturbed
    flops = _TOKENS * rows * width / min(seconds)
    start_time = time.perf_counter()
    # unbuffered: one large read. Files in the page cache look faster than the disk is
    with file.open("rb", buffering=0) as stream:
        count = len(stream.read(_READ_BYTES))
    return Machine(flops, count / max(time.perf_counter() - start_time, 1e-9))
