"""Count zeros and check patterns in the files of a checkpoint, reading a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunebench.errors import IncompatibleData
from prunebench.models.safetensors_files import (
    StoredTensor,
    check_weight_files,
    stored_tensors,
    weight_files,
)
from prunebench.sparsity import Sparsity

PRUNED_RATIO = 0.1
"""A matrix with more zeros than this counts as pruned; 4-bit rounding alone makes about 1%."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorFacts:
    """Counts of one stored floating-point tensor.

    Attributes:
        zeros: Elements that are zero, of either sign.
        negative_zeros: Elements that are -0.0, which packers of 2:4 weights take for a value.
        non_finite: NaN and infinities.
        axis: The axis of the groups of the pattern: -1, or 0 for a matrix whose groups hold only
            along that axis (GPT-2 stores [in, out]); null if nothing was checked.
        violations: Groups that break the pattern; null for a vector, or if M does not divide the
            axis.
        first_violation: Index of the first element of the first of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    zeros: int
    negative_zeros: int
    non_finite: int
    axis: int | None
    violations: int | None
    first_violation: tuple[int, ...] | None

    @property
    def is_pruned(self) -> bool:
        """Whether it is a matrix with more than `PRUNED_RATIO` zeros."""
        return len(self.shape) >= 2 and self.zeros > PRUNED_RATIO * self.size

    @property
    def holds(self) -> bool:
        """Whether the pattern was checked and holds in every group."""
        return self.violations == 0


@dataclass(frozen=True)
class Totals:
    """Sums over tensors; `broken` is the number of tensors that break the pattern."""

    tensors: int
    size: int
    zeros: int
    negative_zeros: int
    non_finite: int
    broken: int

    @classmethod
    def of(cls, rows: Sequence[TensorFacts]) -> Totals:
        """Sum the counts of tensors."""
        return cls(
            tensors=len(rows),
            size=sum(row.size for row in rows),
            zeros=sum(row.zeros for row in rows),
            negative_zeros=sum(row.negative_zeros for row in rows),
            non_finite=sum(row.non_finite for row in rows),
            broken=sum(not row.holds for row in rows),
        )


def inspect_checkpoint(path: Path, pattern: Sparsity) -> list[TensorFacts]:
    """Count zeros in every floating-point tensor of a safetensors file or folder.

    Args:
        path: A folder (with one file or shards), or one file.
        pattern: N:M to check, along the last dimension; a ratio checks no groups.

    Raises:
        IncompatibleData: There are no safetensors, or a file is damaged.
    """
    return inspect_tensors(checkpoint_tensors(path).values(), pattern)


def checkpoint_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file or folder, by name.

    Raises:
        IncompatibleData: There are no safetensors, or a file is damaged.
    """
    if path.is_dir():
        check_weight_files(path)
        files = weight_files(path)
    elif path.suffix != ".safetensors":
        pickled = "pickled weights are never read" if path.suffix in _PICKLES else ""
        raise IncompatibleData(
            f"{path} is not a safetensors file",
            where=pickled or "a checkpoint is a .safetensors file or a folder of them",
            fix="name a folder written by save_pretrained, or one of its .safetensors files",
        )
    else:
        files = [path]
    return stored_tensors(files)


def unreadable(tensors: Iterable[StoredTensor]) -> dict[str, str]:
    """Return the dtype of each tensor that cannot be read because torch has no such dtype."""
    return {
        tensor.name: tensor.dtype
        for tensor in tensors
        if not isinstance(getattr(torch, tensor.dtype, None), torch.dtype)
    }


def inspect_tensors(tensors: Iterable[StoredTensor], pattern: Sparsity) -> list[TensorFacts]:
    """Count zeros in the floating-point ones of these tensors; see `inspect_checkpoint`."""
    return [
        _facts(tensor, pattern)
        for tensor in tensors
        if tensor.size and isinstance(getattr(torch, tensor.dtype, None), torch.dtype)
        if getattr(torch, tensor.dtype).is_floating_point
    ]


def _facts(stored: StoredTensor, pattern: Sparsity) -> TensorFacts:
    """Count in one tensor, a piece at a time."""
    zeros = negative_zeros = broken = non_finite = 0
    # A vector (norm, bias) has no groups, nor has a last side that M does not divide.
    checked = len(stored.shape) >= 2 and pattern.group is not None
    along = checked and stored.shape[-1] % (pattern.group or 1) == 0
    first: int | None = None
    done = 0  # rows before this piece
    for rows in _rows(stored):
        zero = rows == 0
        # count_nonzero, since sum() copies bools to int64 first: twice the piece
        zeros += int(zero.count_nonzero())
        # -0.0 == 0.0, so only its sign bit shows it
        negative_zeros += int((zero & torch.signbit(rows)).count_nonzero())
        non_finite += rows.numel() - int(torch.isfinite(rows).count_nonzero())
        if along:  # a piece holds whole rows, so no group is cut
            count, position = _violations(zero, pattern)
            broken += count
            if first is None and position is not None:
                # Row-major position in the whole tensor.
                first = done * stored.shape[-1] + position
        done += len(rows)
    axis, violations = (-1, broken) if along else (None, None)
    # A Conv1D weight [in, out] of GPT-2 has its groups along axis 0.
    if violations != 0 and checked and _holds_across(stored, zeros, pattern):
        axis, violations, first = 0, 0, None
    return TensorFacts(
        name=stored.name,
        shape=stored.shape,
        dtype=stored.dtype,
        size=stored.size,
        zeros=zeros,
        negative_zeros=negative_zeros,
        non_finite=non_finite,
        axis=axis,
        violations=violations,
        first_violation=None if first is None else _unravel(first, stored.shape),
    )


def _rows(stored: StoredTensor, *, multiple: int = 1) -> Iterator[Tensor]:
    """Yield a tensor in pieces [rows, last dimension]; `rows` is a multiple but in the last one."""
    dtype = getattr(torch, stored.dtype)
    width = stored.shape[-1] if stored.shape else 1
    for piece in stored.pieces(align=width * dtype.itemsize * multiple):
        rows = torch.frombuffer(piece, dtype=dtype).view(-1, width)  # [rows, width]
        yield rows.float() if dtype.itemsize == 1 else rows  # few operations support float8


def _violations(zero: Tensor, pattern: Sparsity) -> tuple[int, int | None]:
    """Return how many groups along the rows break the pattern, and where the first begins.

    Args:
        zero: Bool [rows, width], whose width M divides.
        pattern: N:M.
    """
    assert pattern.kept is not None and pattern.group is not None
    groups = zero.view(-1, pattern.group)  # [groups, M]
    broken = groups.sum(-1, dtype=torch.int16) < pattern.group - pattern.kept
    # argmax returns the first of equal values; it takes no bools, hence uint8.
    count = int(broken.sum())
    return count, int(broken.to(torch.uint8).argmax()) * pattern.group if count else None


def _holds_across(stored: StoredTensor, zeros: int, pattern: Sparsity) -> bool:
    """Return whether the pattern holds along axis 0; reads the matrix only if zeros suffice."""
    assert pattern.kept is not None and pattern.group is not None
    if len(stored.shape) != 2 or stored.shape[0] % pattern.group:
        return False
    # M - N of every M weights must be zero: with fewer zeros in all it cannot hold.
    if zeros * pattern.group < stored.size * (pattern.group - pattern.kept):
        return False
    return not any(
        _violations((rows == 0).T.contiguous(), pattern)[0]  # [out, rows], rows a multiple of M
        for rows in _rows(stored, multiple=pattern.group)
    )


def _unravel(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of an element from its row-major position."""
    index: list[int] = []
    for size in reversed(shape):
        position, rest = divmod(position, size)
        index.append(rest)
    return tuple(reversed(index))
