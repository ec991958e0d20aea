"""Looking at safetensors files without loading them: which there are, and whether they are whole.

The format is an 8-byte little-endian header length, a JSON header, and the tensors' bytes
(https://github.com/huggingface/safetensors#format); a file whose size differs from what its header
says was cut off or damaged.
"""

from __future__ import annotations

import json
from pathlib import Path

from prunebench.errors import IncompatibleData

_HEADER_LIMIT_BYTES = 100 << 20
INDEX_NAME = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, sorted; those of its index if it has one."""
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise _damaged(index, f"not a weight index: {error}") from None
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))


def read_header(path: Path) -> dict[str, dict[str, object]]:
    """Return the header of a safetensors file: tensor name to dtype, shape and data offsets.

    Raises:
        IncompatibleData: The file is damaged or cut off; what is wrong is named.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
            raise _damaged(path, f"its header does not fit its {size:,} bytes")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((int(row["data_offsets"][1]) for row in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"its header is not readable: {error}") from None
    if size != 8 + length + end:
        raise _damaged(path, f"its header promises {8 + length + end:,} bytes, it has {size:,}")
    return dict(header)


def check_weight_files(folder: Path) -> None:
    """Raise `IncompatibleData` if a weight file is missing, cut off or damaged."""
    files = weight_files(folder)
    if not files:
        raise IncompatibleData(
            f"{folder} holds no safetensors",
            where="pickled weights (.bin, .pt) are never read",
            fix="save the model with save_pretrained, which writes safetensors",
        )
    for path in files:
        if not path.is_file():
            raise _damaged(path, f"{INDEX_NAME} names it, and it is not there")
        read_header(path)


def _damaged(path: Path, reason: str) -> IncompatibleData:
    return IncompatibleData(
        f"{path} is damaged", where=reason, fix="copy or download the file again"
    )
