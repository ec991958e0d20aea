"""Sums of squares of every input that a parameter is multiplied with, in one ordinary forward pass.

Written without a line of prunebench, and one level below its hooks: a `TorchDispatchMode` sees the
matrix products that are really made, whatever Python calls they come from, and knows parameters by
the memory that they lie in. An operation that reads a matrix and is not such a product is noted.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_PRODUCTS = {  # where the two matrices are among the arguments
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}


@dataclass
class Oracle(TorchDispatchMode):
    """Watches a forward pass; to be used in a `with` statement.

    Attributes:
        sums: By the memory of a matrix (storage, first element, step between inputs) the sums of
            squares of the inputs that it was multiplied with, float64 (in,).
        others: By storage the operations that read it and are not products.
    """

    model: nn.Module
    sums: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    others: dict[int, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._storages = {_storage(p) for p in self.model.parameters() if p.ndim >= 2}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        places = _PRODUCTS.get(func)
        seen: set[int] = set()
        if places is not None:
            left, right = (args[place] for place in places)
            if right.ndim > 1 and _storage(right) in self._storages:
                seen.add(self._add(right.transpose(-1, -2), left))
            if _storage(left) in self._storages:
                inputs = right.transpose(-1, -2) if right.ndim > 1 else right[None]
                seen.add(self._add(left, inputs))
        made = {_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and _storage(leaf) in self._storages - made - seen:
                self.others.setdefault(_storage(leaf), set()).add(str(func))
        return result

    def _add(self, matrix: Tensor, inputs: Tensor) -> int:
        """Add inputs (..., in) of a matrix (out, in), or of a batch of views of one or several."""
        if matrix.ndim == 3 and matrix.stride(0) != 0 and matrix.shape[0] > 1:
            for row, rows in zip(matrix, inputs, strict=True):
                self._add(row, rows)
            return _storage(matrix)
        matrix = matrix[0] if matrix.ndim == 3 else matrix
        squares = inputs.to(torch.float64).square().flatten(0, -2).sum(0)
        key = (_storage(matrix), matrix.storage_offset(), matrix.stride(-1))
        self.sums[key] = self.sums.get(key, 0) + squares
        return _storage(matrix)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
