"""What `config.json` says of how weights are stored and run, read before a model is built of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunebench.errors import IncompatibleData

FP8 = "fp8"
_WHERE = ("quantization_config", "compression_config", "quantization")  # the last one is of MLX


def stored_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` as it is; empty if there is none or it cannot be read."""
    try:
        document = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # whoever builds the model of it reads it again, and says why
    return document if isinstance(document, dict) else {}


def quantization_of(folder: Path) -> str | None:
    """Return the method that a checkpoint is quantised with, as its config calls it."""
    for settings in _quantizations(stored_config(folder)):
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            return "bitsandbytes"
        return str(settings.get("quant_method") or settings.get("quant_algo") or "unknown method")
    return None


def quantization_settings(folder: Path) -> dict[str, Any]:
    """Return what the config says of the quantisation; empty if it says nothing."""
    return next(_quantizations(stored_config(folder)), {})


def _quantizations(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for name in _WHERE:
            settings = part.get(name)
            if isinstance(settings, dict) and settings:
                yield {"quant_method": "mlx"} | settings if name == "quantization" else settings


def require_unquantised(folder: Path, *, name: str = "", reads: tuple[str, ...] = ()) -> None:
    """Refuse weights that are codes of another method's.

    Args:
        folder: Holds `config.json`.
        name: What the user calls it; by default the folder.
        reads: Methods whose weights can be read all the same.

    Raises:
        IncompatibleData: The config names a quantisation.
    """
    method = quantization_of(folder)
    if method is not None and method not in reads:
        raise IncompatibleData(
            f"{name or folder} is quantised with {method}: give the unquantised checkpoint",
            where="config.json says so; pruning needs the weights themselves, in floating point",
            fix="use the repository that it was made from, often the same name without the suffix",
        )


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what it says of a quantisation, at any depth."""
    return {
        key: plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _WHERE
    }


def asked_attention(folder: Path) -> str | None:
    """Return the attention that `config.json` asks for, which is not what a run uses."""
    config = stored_config(folder)
    asked = config.get("attn_implementation") or config.get("_attn_implementation")
    return asked if isinstance(asked, str) else None
