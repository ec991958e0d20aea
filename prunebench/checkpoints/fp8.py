"""Read fine-grained FP8 checkpoints as dense ones.

A matrix is stored as float8, with NAME_scale_inv: one factor for each block of `weight_block_size`
elements, or one for the matrix; the weight is the product. Products are computed in float32, with
one rounding; a run in bfloat16 rounds them again, as any reader would. Activation scales are for
kernels that compute in float8, and are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from prunebench.checkpoints.derived import Derived, read_tensor
from prunebench.errors import IncompatibleData
from prunebench.models.safetensors_files import StoredTensor
from prunebench.models.stored_config import (
    FP8,
    plain,
    quantization_of,
    quantization_settings,
    stored_config,
)

_SCALE, _ACTIVATION = "_scale_inv", ".activation_scale"
_SCALES = ("float32", "bfloat16", "float16")


def is_fp8(folder: Path) -> bool:
    """Return whether the config of a folder names this format."""
    return quantization_of(folder) == FP8


def plain_fp8_config(folder: Path) -> dict[str, Any]:
    """Return the config without its quantization settings."""
    return plain(stored_config(folder))


def fp8_tensors(folder: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors by name, those in float8 as float32 ones.

    Args:
        folder: The folder, for its config.
        stored: Its tensors, from `stored_tensors`.

    Raises:
        IncompatibleData: A scale is missing, has an unsupported dtype, or does not fit its matrix.
    """
    # [block rows, block columns], or none if every matrix has one factor.
    size = quantization_settings(folder).get("weight_block_size")
    block = (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None
    dense: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        base = name.removesuffix(_SCALE)
        # A scale is dropped only next to its matrix; any other name that ends so is a tensor.
        if name.endswith(_ACTIVATION) or (base != name and base in stored):
            continue
        dense[name] = tensor
        if tensor.dtype.startswith("float8"):
            dense[name] = _dense(tensor, stored.get(name + _SCALE), block)
    return dense


def _dense(
    tensor: StoredTensor, scale: StoredTensor | None, block: tuple[int, int] | None
) -> StoredTensor:
    """Return a float8 tensor times its scales, multiplied when it is read."""
    if scale is None:
        raise _unfit(tensor, f"{tensor.name}{_SCALE} is missing")
    if scale.dtype not in _SCALES:
        raise _unfit(tensor, f"its scale is {scale.dtype}, and {', '.join(_SCALES)} are read")
    if scale.size != 1:
        if block is None or len(tensor.shape) < 2:
            raise _unfit(tensor, f"{scale.size} scales, and no weight_block_size to spread them by")
        sides = zip(tensor.shape[-2:], block, strict=True)
        # [..., ceil(rows / block rows), ceil(columns / block columns)]
        grid = (*tensor.shape[:-2], *(-(-side // step) for side, step in sides))
        if scale.shape != grid:
            raise _unfit(tensor, f"its scale is {list(scale.shape)}, blocks of {block} need {grid}")

    def make() -> Tensor:
        weight = read_tensor(tensor).float()  # [..., rows, columns]
        factors = read_tensor(scale).float()
        if factors.numel() == 1:
            return weight * factors.reshape(())
        assert block is not None
        rows, columns = weight.shape[-2:]
        # The last block of a row or column may be cut off by the matrix's end, hence the slices.
        factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]  # [..., rows, blocks]
        factors = factors.repeat_interleave(block[1], -1)[..., :columns]  # [..., rows, columns]
        return weight * factors

    name, shape = tensor.name, tensor.shape
    return Derived.of(tensor, name=name, dtype="float32", shape=shape, make=make)


def _unfit(tensor: StoredTensor, reason: str) -> IncompatibleData:
    return IncompatibleData(
        f"{tensor.name} cannot be read as fp8: {reason}",
        where=f"in {tensor.path}, whose config says quant_method fp8",
        fix="give the unquantized checkpoint",
    )
