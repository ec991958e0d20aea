"""Bytes of a checkpoint in the forms that it could take, computed from its zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prunebench.checkpoints.inspect import TensorFacts, inspect_tensors
from prunebench.models.safetensors_files import StoredTensor
from prunebench.results.bench_schema import StorageBlock
from prunebench.sparsity import Sparsity


def computed_storage(tensors: Sequence[StoredTensor]) -> StorageBlock:
    """Return what a checkpoint takes as it is, with 2:4 packed, and with bitmaps."""
    total = sum(one.stop - one.start for one in tensors)
    facts = inspect_tensors(tensors, Sparsity.of_pattern(2, 4))
    sizes = {one.name: one.stop - one.start for one in tensors}
    pruned = [one for one in facts if one.is_pruned]
    packed = [one for one in pruned if one.holds and len(one.shape) == 2]
    return StorageBlock(
        dense_bytes=total,
        packed24_bytes=total - _saved(packed, sizes, packed24_bytes) if packed else None,
        bitmap_bytes=total - _saved(pruned, sizes, bitmap_bytes),
        pruned_bytes=sum(sizes[one.name] for one in pruned),
    )


def packed24_bytes(facts: TensorFacts, dense_bytes: int) -> int:
    """Return half of the values and half a bit for each weight."""
    rows, width = facts.shape if facts.axis == -1 else facts.shape[::-1]
    return dense_bytes // 2 + rows * ((width + 7) // 8)


def bitmap_bytes(facts: TensorFacts, dense_bytes: int) -> int:
    """Return a bit for every weight and the kept values; the dense bytes where those are fewer."""
    each = dense_bytes // facts.size
    return min(dense_bytes, (facts.size - facts.zeros) * each + (facts.size + 7) // 8)


def _saved(
    facts: Iterable[TensorFacts], sizes: dict[str, int], bytes_of: Callable[[TensorFacts, int], int]
) -> int:
    return sum(sizes[one.name] - bytes_of(one, sizes[one.name]) for one in facts)
