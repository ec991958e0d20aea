"""Read folders with packed 2:4 matrices, as `checkpoints.packed24` writes them, as dense ones.

A matrix [out, in] is stored as NAME.values24 [out, in / 2] and NAME.codes24 uint8
[out, ceil(in / 8)], see `sparse24.packed`; `packed24.json` lists every tensor of the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from prunebench.checkpoints.derived import Derived, read_tensor
from prunebench.checkpoints.packed24_index import CODES, VALUES, read_rows
from prunebench.errors import IncompatibleData
from prunebench.models.safetensors_files import PACKED_INDEX, StoredTensor
from prunebench.sparse24.packed import Packed24, require_sound, unpack24


def packed24_tensors(
    folder: Path,
    stored: dict[str, StoredTensor],
    rows: dict[str, dict[str, Any]] | None = None,
) -> dict[str, StoredTensor]:
    """Return the tensors of a packed folder as if they were dense.

    Args:
        folder: The folder, for its index.
        stored: Its tensors, from `stored_tensors`.
        rows: Its index, from `read_rows`; None reads `packed24.json`.

    Raises:
        IncompatibleData: The index is damaged, or the tensors do not match it.
    """
    rows = read_rows(folder / PACKED_INDEX) if rows is None else rows
    indexed: set[str] = set()
    for name, row in rows.items():
        is_packed = row["stored"] == "packed24"
        indexed |= {name + VALUES, name + CODES} if is_packed else {name}
    for names, what in (
        (sorted(indexed - stored.keys()), "misses"),
        (sorted(stored.keys() - indexed), "has more than its index:"),
    ):
        if names:
            raise IncompatibleData(
                f"{folder} {what} {len(names)} tensors, the first is {names[0]}",
                where=f"{PACKED_INDEX} names {len(indexed)} tensors, the files hold {len(stored)}",
                fix="copy or download the folder again, or export the checkpoint again",
            )
    return {name: _from_index(name, row, stored) for name, row in rows.items()}


def _from_index(name: str, row: dict[str, Any], stored: dict[str, StoredTensor]) -> StoredTensor:
    """Return a tensor of the index as if it were dense."""
    shape, dtype = tuple(row["shape"]), str(row["dtype"])
    if row["stored"] == "dense":
        tensor = stored[name]
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise _unlike(tensor, shape, dtype)
        return tensor
    values, codes = stored[name + VALUES], stored[name + CODES]
    across = bool(row.get("transposed"))
    out, width = (shape[1], shape[0]) if across else shape
    # Two of four weights are kept: [out, in / 2].
    if (values.shape, values.dtype) != ((out, width // 2), dtype):
        raise _unlike(values, (out, width // 2), dtype)
    # Four bits for each group of four, so a byte for eight weights: [out, ceil(in / 8)].
    if (codes.shape, codes.dtype) != ((out, (width + 7) // 8), "uint8"):
        raise _unlike(codes, (out, (width + 7) // 8), "uint8")

    def make() -> Tensor:
        packed = Packed24(read_tensor(values), read_tensor(codes))
        require_sound(packed, name=name)
        dense = unpack24(packed)  # [out, in]
        # A matrix that is stored as [in, out] was packed as [out, in].
        return dense.T.contiguous() if across else dense

    return Derived.of(values, name=name, dtype=dtype, shape=shape, make=make)


def _unlike(tensor: StoredTensor, shape: tuple[int, ...], dtype: str) -> IncompatibleData:
    return IncompatibleData(
        f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, "
        f"{PACKED_INDEX} says {dtype} {list(shape)}",
        where=f"in {tensor.path}",
        fix="copy or download the folder again, or export the checkpoint again",
    )
