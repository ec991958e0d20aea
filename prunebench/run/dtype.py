"""Choose the dtype in which a model is loaded: the requested one, or by checkpoint and device.

`auto` is the checkpoint's own dtype on CUDA and on a CPU that has instructions for it, else
float32. Statistics and solvers are float32 in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from prunebench.models.device import is_emulated
from prunebench.models.source import ModelSource
from prunebench.models.stored_dtype import StoredDtype
from prunebench.run.memory import gigabytes
from prunebench.spec import AUTO


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype in which a model is loaded.

    Attributes:
        dtype: One of `spec.DTYPES`.
        reason: Why, in a few words.
        notes: Lines to show to the user.
    """

    dtype: str
    reason: str
    notes: tuple[str, ...] = ()


def choose_dtype(
    asked: str,
    source: ModelSource,
    folder: Path,
    device: torch.device,
    *,
    saves: bool = False,
    stored: StoredDtype | None = None,
) -> DtypeChoice:
    """Choose the dtype of a run.

    Args:
        asked: One of `spec.DTYPES`, or `auto`.
        source: Of the model: an alias has its dtype in the catalog.
        folder: Where its files are.
        device: What it runs on.
        saves: Whether the model is saved afterwards: adds a note if the dtype makes it larger.
        stored: What the checkpoint holds, where `folder` is a dense copy of it.

    Raises:
        IncompatibleData: A file is damaged.
    """
    if asked == AUTO and source.entry:
        asked, reason = source.entry.dtype, "the alias's"
    elif asked == AUTO and source.kind == "gguf":
        asked, reason = "float32", "GGUF is dequantized to it"
    elif asked == AUTO:
        return _own(stored or StoredDtype.of(folder), device)
    else:
        reason = "asked for"
    notes = []
    if is_emulated(getattr(torch, asked), device):
        notes.append(f"{asked} is emulated on this CPU: float32 is several times faster")
    if saves and (grown := _grown(StoredDtype.of(folder), asked)):
        notes.append(f"read as {asked}: {grown}")
    return DtypeChoice(asked, reason, tuple(notes))


def _own(stored: StoredDtype, device: torch.device) -> DtypeChoice:
    notes = []
    if stored.in_config and stored.in_files and stored.in_config != stored.in_files:
        notes.append(
            f"config.json says {stored.in_config}, the block matrices are {stored.in_files}"
        )
    emulated = is_emulated(getattr(torch, stored.dtype), device)
    if emulated is False:  # None: unknown
        if stored.in_files != stored.dtype:
            grown = _grown(stored, stored.dtype)
            notes.append(
                f"{stored.in_files} is read as {stored.dtype}" + (f"; {grown}" if grown else "")
            )
        return DtypeChoice(stored.dtype, "the checkpoint's own", tuple(notes))
    reason = f"{stored.dtype} is emulated on this CPU"
    if emulated is None:
        reason = f"this CPU does not say whether it has instructions for {stored.dtype}"
    notes.append(f"{reason}: reading as float32; {_grown(stored, 'float32')}")
    return DtypeChoice("float32", reason, tuple(notes))


def _grown(stored: StoredDtype, dtype: str) -> str:
    """Return a note on how much larger a saved model becomes in a dtype, or ""."""
    size = stored.saved_bytes(dtype)
    if size <= stored.all_bytes:
        return ""
    return f"a saved model will have {gigabytes(size)} instead of {gigabytes(stored.all_bytes)}"
