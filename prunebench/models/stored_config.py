"""Quantization and attention settings of a `config.json`, read and written without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunebench.errors import IncompatibleData
from prunebench.files import write_text

FP8 = "fp8"
PACKED24 = "packed24"
"""The quantization method of a folder with packed 2:4 matrices, see `checkpoints.packed24`."""
_KEYS = ("quantization_config", "compression_config", "quantization")  # the last one is MLX's


def stored_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` as a dictionary; empty if there is none or it cannot be read."""
    try:
        document = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # load_config raises for it
    return document if isinstance(document, dict) else {}


def store_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.json`; one that is there is replaced, not changed in place: it may be a link.

    Raises:
        SaveError: It cannot be written.
    """
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / "config.json", text)


def quantization_of(folder: Path) -> str | None:
    """Return the quantization method of a checkpoint by its name in the config, or None."""
    for settings in _quantizations(stored_config(folder)):
        # Configs of bitsandbytes from before `quant_method` existed.
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            return "bitsandbytes"
        return str(settings.get("quant_method") or settings.get("quant_algo") or "unknown method")
    return None


def quantization_settings(folder: Path) -> dict[str, Any]:
    """Return the quantization settings of the config; empty if there are none."""
    return next(_quantizations(stored_config(folder)), {})


def _quantizations(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the quantization settings of a config and of its parts (`text_config`)."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in _KEYS:
            settings = part.get(name)
            if isinstance(settings, dict) and settings:
                yield {"quant_method": "mlx"} | settings if name == "quantization" else settings


def require_unquantized(folder: Path, *, name: str = "", reads: tuple[str, ...] = ()) -> None:
    """Refuse a quantized checkpoint.

    Args:
        folder: Holds `config.json`.
        name: What the user calls it; by default the folder.
        reads: Methods whose weights can be read all the same.

    Raises:
        IncompatibleData: The config names a quantization method.
    """
    method = quantization_of(folder)
    if method is not None and method not in reads:
        raise IncompatibleData(
            f"{name or folder} is quantized with {method}: give the unquantized checkpoint",
            where="config.json says so; pruning needs the weights themselves, in floating point",
            fix="use the repository that it was made from, often the same name without the suffix",
        )


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without its quantization settings, at any depth."""
    return {
        key: plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _KEYS
    }


def asked_attention(folder: Path) -> str | None:
    """Return the attention implementation that `config.json` names; no run uses it."""
    config = stored_config(folder)
    asked = config.get("attn_implementation") or config.get("_attn_implementation")
    return asked if isinstance(asked, str) else None
