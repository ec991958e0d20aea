"""Size of a checkpoint if its zeros were stored as packed 2:4 or as bitmaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prunebench.checkpoints.inspect import TensorFacts, inspect_tensors
from prunebench.models.safetensors_files import StoredTensor
from prunebench.results.bench_schema import StorageBlock
from prunebench.sparsity import Sparsity


def computed_storage(tensors: Sequence[StoredTensor]) -> StorageBlock:
    """Return the bytes of a checkpoint as it is, with 2:4 matrices packed, and with bitmaps."""
    facts = inspect_tensors(tensors, Sparsity.of_pattern(2, 4))
    sizes = {tensor.name: tensor.stop - tensor.start for tensor in tensors}
    total = sum(sizes.values())
    pruned = [matrix for matrix in facts if matrix.is_pruned]
    packed = [matrix for matrix in pruned if matrix.holds and len(matrix.shape) == 2]
    return StorageBlock(
        dense_bytes=total,
        packed24_bytes=total - _saved(packed, sizes, packed24_bytes) if packed else None,
        bitmap_bytes=total - _saved(pruned, sizes, bitmap_bytes),
        pruned_bytes=sum(sizes[matrix.name] for matrix in pruned),
    )


def packed24_bytes(facts: TensorFacts, dense_bytes: int) -> int:
    """Return the packed size of a 2:4 matrix: half of the values, and half a byte per 4 weights."""
    # Groups of four along axis 0: the matrix is packed transposed.
    rows, width = facts.shape if facts.axis == -1 else facts.shape[::-1]
    return dense_bytes // 2 + rows * ((width + 7) // 8)


def bitmap_bytes(facts: TensorFacts, dense_bytes: int) -> int:
    """Return the size of the nonzero values and one bit per weight, at most the dense size."""
    item_bytes = dense_bytes // facts.size
    # With few zeros the bitmap costs more than it saves: the matrix would stay dense.
    return min(dense_bytes, (facts.size - facts.zeros) * item_bytes + (facts.size + 7) // 8)


def _saved(
    facts: Iterable[TensorFacts], sizes: dict[str, int], bytes_of: Callable[[TensorFacts, int], int]
) -> int:
    """Return the bytes that a format saves over all of these matrices."""
    return sum(sizes[matrix.name] - bytes_of(matrix, sizes[matrix.name]) for matrix in facts)
