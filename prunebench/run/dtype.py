"""Choose the dtype in which a model is loaded: the requested one, or by checkpoint and device.

`auto` is the checkpoint's own dtype on CUDA and on a CPU that has instructions for it, else
float32. What the headers of the files say counts, not what `config.json` says: a config is easily
copied from another model. Statistics and solvers are float32 in any case.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from prunebench.models.device import is_emulated
from prunebench.models.safetensors_files import StoredTensor, stored_tensors, weight_files
from prunebench.models.source import ModelSource
from prunebench.run.memory import gigabytes
from prunebench.spec import AUTO, DTYPES

_IN_A_BLOCK = re.compile(r"\.\d+\.")  # model.layers.0.mlp.up_proj.weight


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


@dataclass(frozen=True)
class StoredDtype:
    """The dtypes and sizes in the files of a checkpoint.

    Attributes:
        dtype: The nearest that a run supports to that of the block matrices.
        in_files: Of the block matrices, as torch or the format names it.
        in_config: The dtype in `config.json`, or "".
        numbers: Count of floating-point elements.
        other_bytes: Bytes of all other tensors.
        all_bytes: Bytes of all tensors.
    """

    dtype: str
    in_files: str
    in_config: str
    numbers: int
    other_bytes: int
    all_bytes: int

    @classmethod
    def of(cls, folder: Path) -> StoredDtype:
        """Read the headers of a model's folder; no weight is read.

        Raises:
            IncompatibleData: A file is damaged.
        """
        tensors = list(stored_tensors(weight_files(folder)).values())
        floats = [tensor for tensor in tensors if "float" in tensor.dtype]
        # norms are often float32 in a bfloat16 checkpoint: only the matrices of the blocks decide
        matrices = [
            tensor for tensor in floats if len(tensor.shape) > 1 and _IN_A_BLOCK.search(tensor.name)
        ]
        # models whose blocks are not numbered have no such matrices
        in_files = _most(matrices) or _most(floats)
        in_config = _dtype_of_config(folder / "config.json")
        # neither is one of ours (float8, quantized): bfloat16
        dtype = next((name for name in (in_files, in_config) if name in DTYPES), "bfloat16")
        if in_files == "float64":
            dtype = "float32"
        others = sum(
            tensor.stop - tensor.start for tensor in tensors if "float" not in tensor.dtype
        )
        everything = sum(tensor.stop - tensor.start for tensor in tensors)
        # elements, as the bytes depend on the dtype that is chosen
        numbers = sum(tensor.size for tensor in floats)
        return cls(dtype, in_files, in_config, numbers, others, everything)

    def saved_bytes(self, dtype: str) -> int:
        """Return the bytes of the model if it is loaded and saved in a dtype."""
        width: int = getattr(torch, dtype).itemsize
        return self.numbers * width + self.other_bytes


def _most(tensors: list[StoredTensor]) -> str:
    """Return the dtype of most elements, or ""."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.size
    return counts.most_common(1)[0][0] if counts else ""


def _dtype_of_config(path: Path) -> str:
    """Return what a config names, at its top or for its text model, by the new key or the old."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # what is wrong with it is said where it is read
        return ""
    inner = config.get("text_config") if isinstance(config, dict) else None
    # multimodal configs keep the language model's under text_config
    for section in filter(lambda value: isinstance(value, dict), (config, inner)):
        for key in ("dtype", "torch_dtype"):
            if isinstance(section.get(key), str):
                return str(section[key]).removeprefix("torch.")
    return ""


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
