"""Read checkpoints in the format `sparse-24-bitmask` of compressed-tensors as dense ones.

The library that wrote them no longer reads them (removed in 2026). A module's weight [N, K] is
stored as three tensors: `compressed` [N, K/2], the kept values row by row; `bitmask` uint8
[N, ceil(K/8)], one bit per weight, lowest bit first; `shape`, two integers. The format is named in
`config.json`, under `sparsity_config` of `quantization_config` or of `compression_config`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunebench.checkpoints.derived import Derived, read_tensor
from prunebench.errors import IncompatibleData
from prunebench.models.safetensors_files import StoredTensor

FORMAT = "sparse-24-bitmask"
_KEYS = ("quantization_config", "compression_config", "sparsity_config")
_PARTS = ("compressed", "bitmask", "shape")


def is_bitmask(folder: Path) -> bool:
    """Return whether the config of a folder names this format."""
    return _sparsity(_config(folder)).get("format") == FORMAT


def plain_config(folder: Path) -> dict[str, Any] | None:
    """Return the config without its compression settings; None if the format is another one."""
    config = _config(folder)
    if not is_bitmask(folder):
        return None
    return {key: value for key, value in config.items() if key not in _KEYS}


def bitmask_tensors(folder: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors by name, compressed ones as if they were dense.

    Args:
        folder: The folder, for its config.
        stored: Its tensors, from `stored_tensors`.

    Raises:
        IncompatibleData: The weights are quantized too, or a part of one is missing.
    """
    _require_unquantized(folder)
    dense: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS:
            dense[name] = tensor
        elif part == "compressed":
            weight = module if module.endswith(".weight") else f"{module}.weight"
            dense[weight] = _dense(weight, module, stored)
    return dense


def _dense(weight: str, module: str, stored: dict[str, StoredTensor]) -> StoredTensor:
    """Return the weight of a module, decompressed when it is read."""
    missing = [f"{module}.{part}" for part in _PARTS if f"{module}.{part}" not in stored]
    if missing:
        raise IncompatibleData(
            f"{weight} cannot be read: {missing[0]} is missing",
            where=f"in {stored[f'{module}.compressed'].path}",
            fix="copy or download the folder again",
        )
    values, mask, size = (stored[f"{module}.{part}"] for part in _PARTS)
    shape = tuple(int(side) for side in read_tensor(size).flatten().tolist())
    # values [N, K/2], mask [N, ceil(K/8)]
    fits = len(shape) == 2 and values.size * 2 == shape[0] * shape[1]
    fits = fits and mask.shape == (shape[0], (shape[1] + 7) // 8) and mask.dtype == "uint8"
    if not fits or values.dtype not in ("bfloat16", "float16", "float32"):
        raise IncompatibleData(
            f"{weight} is not 2:4 in {FORMAT}: "
            f"{values.dtype} {list(values.shape)} of {list(shape)}",
            where=f"in {values.path}",
            fix="only unquantized weights of 16 or 32 bits are read",
        )

    def make() -> Tensor:
        positions = torch.arange(8, dtype=torch.uint8)
        bits = read_tensor(mask)[..., None] >> positions & 1  # [N, ceil(K/8), 8]
        keep = bits.bool().flatten(1)[:, : shape[1]]  # [N, K], without the padding
        nonzero = read_tensor(values).flatten()  # [N * K/2]
        if int(keep.sum()) != nonzero.numel():
            raise IncompatibleData(
                f"{weight} is damaged: its mask has {int(keep.sum()):,} places for "
                f"{nonzero.numel():,} values",
                fix="copy or download the folder again",
            )
        # masked_scatter_ fills the places of the mask in row-major order, as the values are stored.
        dense = torch.zeros(shape, dtype=nonzero.dtype).masked_scatter_(keep, nonzero)
        return dense + 0.0  # a kept -0.0 becomes +0.0

    return Derived.of(values, name=weight, dtype=values.dtype, shape=shape, make=make)


def _require_unquantized(folder: Path) -> None:
    config = _config(folder)
    block = config.get("quantization_config") or config.get("compression_config") or {}
    if block.get("config_groups"):
        raise IncompatibleData(
            f"{folder} is quantized too ({block.get('format', 'unknown format')})",
            where="config.json has config_groups: its values are not the weights",
            fix="only unquantized 2:4 checkpoints are read",
        )


def _sparsity(config: dict[str, Any]) -> dict[str, Any]:
    """Return the `sparsity_config` of a config, wherever it is; empty if there is none."""
    for key in _KEYS:
        block = config.get(key)
        if isinstance(block, dict):
            sparsity = block if key == "sparsity_config" else block.get("sparsity_config")
            if isinstance(sparsity, dict):
                return sparsity
    return {}


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
