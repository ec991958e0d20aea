"""The dtype of a checkpoint's weights, by the headers of its files.

Not by `config.json`: a config is easily copied from another model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from prunebench.models.safetensors_files import StoredTensor, stored_tensors, weight_files
from prunebench.spec import DTYPES

_IN_A_BLOCK = re.compile(r"\.\d+\.")  # model.layers.0.mlp.up_proj.weight


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
