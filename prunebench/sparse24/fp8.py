"""Fine-grained FP8 checkpoints, read as dense ones.

A matrix is stored as float8, and beside it as NAME_scale_inv one factor for every block of
`weight_block_size` elements, or one for all; the weight is the product. Products are kept in
float32, where they are exact up to one rounding: a run in bfloat16 rounds them as any reader would.
Scales of activations are for kernels that compute in float8, and are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from prunebench.errors import IncompatibleData
from prunebench.models.safetensors_files import StoredTensor
from prunebench.models.stored_config import (
    FP8,
    plain,
    quantization_of,
    quantization_settings,
    stored_config,
)
from prunebench.sparse24.stored import Derived, read_tensor

_SCALE, _ACTIVATION = "_scale_inv", ".activation_scale"
_SCALES = ("float32", "bfloat16", "float16")


def is_fp8(folder: Path) -> bool:
    """Whether the config of a folder names this format."""
    return quantization_of(folder) == FP8


def plain_fp8_config(folder: Path) -> dict[str, Any]:
    """Return the config without its quantisation."""
    return plain(stored_config(folder))


def fp8_tensors(folder: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors by name, those in float8 as float32 matrices.

    Raises:
        IncompatibleData: A scale is missing, of no use, or does not fit its matrix.
    """
    size = quantization_settings(folder).get("weight_block_size")
    block = (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None
    dense: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        base = name.removesuffix(_SCALE)
        if name.endswith(_ACTIVATION) or (base != name and base in stored):
            continue
        dense[name] = tensor
        if tensor.dtype.startswith("float8"):
            dense[name] = _dense(tensor, stored.get(name + _SCALE), block)
    return dense


def _dense(
    tensor: StoredTensor, scale: StoredTensor | None, block: tuple[int, int] | None
) -> StoredTensor:
    if scale is None:
        raise _unfit(tensor, f"{tensor.name}{_SCALE} is missing")
    if scale.dtype not in _SCALES:
        raise _unfit(tensor, f"its scale is {scale.dtype}, and {', '.join(_SCALES)} are read")
    if scale.size != 1:
        if block is None or len(tensor.shape) < 2:
            raise _unfit(tensor, f"{scale.size} scales, and no weight_block_size to spread them by")
        sides = zip(tensor.shape[-2:], block, strict=True)
        grid = (*tensor.shape[:-2], *(-(-side // step) for side, step in sides))
        if scale.shape != grid:
            raise _unfit(tensor, f"its scale is {list(scale.shape)}, blocks of {block} need {grid}")

    def make() -> Tensor:
        weight = read_tensor(tensor).float()
        factors = read_tensor(scale).float()
        if factors.numel() == 1:
            return weight * factors.reshape(())
        assert block is not None
        rows, columns = weight.shape[-2:]
        factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
        factors = factors.repeat_interleave(block[1], -1)[..., :columns]
        return weight * factors

    name, shape = tensor.name, tensor.shape
    return Derived.of(tensor, name=name, dtype="float32", shape=shape, make=make)


def _unfit(tensor: StoredTensor, reason: str) -> IncompatibleData:
    return IncompatibleData(
        f"{tensor.name} cannot be read as fp8: {reason}",
        where=f"in {tensor.path}, whose config says quant_method fp8",
        fix="give the unquantised checkpoint",
    )
