"""Tensors that are computed from others of a file, with the interface of stored ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunebench.errors import IncompatibleData
from prunebench.models.safetensors_files import StoredTensor


@dataclass(frozen=True)
class Derived(StoredTensor):
    """A dense tensor that its file stores in another format; `make` computes it when it is read."""

    make: Callable[[], Tensor]

    @classmethod
    def of(
        cls,
        source: StoredTensor,
        *,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        make: Callable[[], Tensor],
    ) -> Derived:
        """Describe a tensor in the file of `source`; `stop - start` is its size when dense.

        Args:
            source: A stored tensor that it is computed from.
            name: Its name when dense.
            dtype: Its dtype when dense, e.g. `bfloat16`.
            shape: Its shape when dense.
            make: Returns the dense tensor.
        """
        # There is no range of bytes in the file: 0 and the size stand for it.
        size = math.prod(shape) * getattr(torch, dtype).itemsize
        return cls(source.path, name, dtype, shape, 0, size, make)

    def pieces(self, *, align: int = 1) -> Iterator[bytearray]:
        """Yield all its bytes as one piece, row-major."""
        yield bytearray(self.make().contiguous().view(-1).view(torch.uint8).numpy().data)


def read_tensor(stored: StoredTensor) -> Tensor:
    """Read a whole tensor.

    Raises:
        IncompatibleData: The file has become shorter, or torch has no such dtype.
    """
    if isinstance(stored, Derived):
        return stored.make()
    dtype = getattr(torch, stored.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise IncompatibleData(
            f"{stored.name} is {stored.dtype}, which torch does not have",
            where=f"in {stored.path}",
            fix="give the checkpoint without quantized weights",
        )
    # Writable, without which torch warns; the tensor shares its memory, so there is no copy.
    data = bytearray().join(stored.pieces())
    # torch.frombuffer refuses an empty buffer.
    if not data:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(stored.shape)
