"""Looking into a checkpoint's files, one tensor in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunebench.models.safetensors_files import check_weight_files, weight_files
from prunebench.sparsity import Sparsity


@dataclass(frozen=True)
class MatrixFacts:
    """Counts of one stored matrix.

    Attributes:
        violations: Groups that break the pattern; None if its M does not divide the last dimension.
        first_violation: Row and first column of the first of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    zeros: int
    negative_zeros: int
    violations: int | None
    first_violation: tuple[int, int] | None


def inspect_checkpoint(folder: Path, pattern: Sparsity) -> list[MatrixFacts]:
    """Count zeros in every floating matrix of a folder of safetensors, in the files' order.

    The groups of `pattern` run along the last dimension, which is the input for all layers but
    GPT-2's. A ratio as pattern checks no groups.

    Raises:
        IncompatibleData: The folder holds no safetensors, or a damaged file.
    """
    from safetensors import safe_open

    check_weight_files(folder)
    rows = []
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if tensor.ndim >= 2 and tensor.is_floating_point():
                    rows.append(_facts(name, tensor, pattern))
    return rows


def _facts(name: str, tensor: Tensor, pattern: Sparsity) -> MatrixFacts:
    zero = tensor == 0
    violations, first = None, None
    kept, group = pattern.kept, pattern.group
    if group is not None and kept is not None and tensor.shape[-1] % group == 0:
        groups = zero.reshape(-1, tensor.shape[-1] // group, group)
        broken = groups.sum(-1, dtype=torch.int32) < group - kept  # (rows, groups)
        violations = int(broken.sum())
        if violations:
            row, column = divmod(int(broken.reshape(-1).to(torch.uint8).argmax()), broken.shape[1])
            first = (row, column * group)
    return MatrixFacts(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        size=tensor.numel(),
        zeros=int(zero.sum()),
        negative_zeros=int((zero & torch.signbit(tensor)).sum()),
        violations=violations,
        first_violation=first,
    )
