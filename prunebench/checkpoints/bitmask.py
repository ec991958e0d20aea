"""Checkpoints in the format `sparse-24-bitmask` of compressed-tensors, read as dense ones.

The library that wrote them no longer reads them (removed in 2026). A module's weight [N, K] lies in
three tensors: `compressed` [N, K/2], the kept values row by row; `bitmask` uint8 [N, ceil(K/8)],
a bit for every place, the lowest bit first; `shape`, two integers. The format is named in
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
    """Whether the config of a folder names this format."""
    return _sparsity(_config(folder)).get("format") == FORMAT


def plain_config(folder: Path) -> dict[str, Any] | None:
    """Return the config without what says that weights are compressed; None if nothing does."""
    config = _config(folder)
    if not is_bitmask(folder):
        return None
    return {key: value for key, value in config.items() if key not in _KEYS}


def bitmask_tensors(folder: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors by name, compressed ones as if they were dense.

    Raises:
        IncompatibleData: The weights are quantised too, or a part of one is missing.
    """
    _require_unquantised(folder)
    found: dict[str, StoredTensor] = {}
    for name, one in stored.items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS:
            found[name] = one
        elif part == "compressed":
            weight = module if module.endswith(".weight") else f"{module}.weight"
            found[weight] = _dense(weight, module, stored)
    return found


def _dense(weight: str, module: str, stored: dict[str, StoredTensor]) -> StoredTensor:
    missing = [f"{module}.{part}" for part in _PARTS if f"{module}.{part}" not in stored]
    if missing:
        raise IncompatibleData(
            f"{weight} cannot be read: {missing[0]} is missing",
            where=f"in {stored[f'{module}.compressed'].path}",
            fix="copy or download the folder again",
        )
    values, mask, size = (stored[f"{module}.{part}"] for part in _PARTS)
    shape = tuple(int(side) for side in read_tensor(size).flatten().tolist())
    fits = len(shape) == 2 and values.size * 2 == shape[0] * shape[1]
    fits = fits and mask.shape == (shape[0], (shape[1] + 7) // 8) and mask.dtype == "uint8"
    if not fits or values.dtype not in ("bfloat16", "float16", "float32"):
        raise IncompatibleData(
            f"{weight} is not 2:4 in {FORMAT}: "
            f"{values.dtype} {list(values.shape)} of {list(shape)}",
            where=f"in {values.path}",
            fix="only unquantised weights of 16 or 32 bits are read",
        )

    def make() -> Tensor:
        places = torch.arange(8, dtype=torch.uint8)
        bits = (read_tensor(mask)[..., None] >> places & 1).bool().flatten(1)[:, : shape[1]]
        kept = read_tensor(values).flatten()
        if int(bits.sum()) != kept.numel():
            raise IncompatibleData(
                f"{weight} is damaged: its mask has {int(bits.sum()):,} places for "
                f"{kept.numel():,} values",
                fix="copy or download the folder again",
            )
        return torch.zeros(shape, dtype=kept.dtype).masked_scatter_(bits, kept) + 0.0

    return Derived.of(values, name=weight, dtype=values.dtype, shape=shape, make=make)


def _require_unquantised(folder: Path) -> None:
    config = _config(folder)
    block = config.get("quantization_config") or config.get("compression_config") or {}
    if block.get("config_groups"):
        raise IncompatibleData(
            f"{folder} is quantised too ({block.get('format', 'unknown format')})",
            where="config.json has config_groups: its values are not the weights",
            fix="only unquantised 2:4 checkpoints are read",
        )


def _sparsity(config: dict[str, Any]) -> dict[str, Any]:
    for key in _KEYS:
        block = config.get(key)
        if isinstance(block, dict):
            found = block if key == "sparsity_config" else block.get("sparsity_config")
            if isinstance(found, dict):
                return found
    return {}


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
