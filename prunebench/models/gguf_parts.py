"""Find and join the parts of a GGUF model, NAME-00001-of-00003.gguf.

This module does not import torch: model names are parsed with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunebench.errors import IncompatibleData, MissingResource

# The names that llama.cpp's gguf-split gives: five digits, counted from 1.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
UNREADABLE = (ValueError, KeyError, OSError, RuntimeError, IndexError, NotImplementedError)


def gguf_name(gguf: Path) -> str:
    """Return the name of a model: the file's name without the part number."""
    part = _PART.match(gguf.stem)
    return part["stem"] if part else gguf.stem


def gguf_parts(gguf: Path) -> list[Path]:
    """Return all files of a model in order, given any of them.

    Raises:
        MissingResource: A part does not exist.
    """
    part = _PART.match(gguf.stem)
    if part is None:
        return [gguf]
    count = int(part["count"])
    numbers = range(1, count + 1)
    parts = [gguf.with_name(f"{part['stem']}-{n:05}-of-{count:05}.gguf") for n in numbers]
    missing = [path.name for path in parts if not path.is_file()]
    if missing or not parts:
        others = "the other is" if count == 2 else f"{len(missing)} others are"
        raise MissingResource(
            f"{gguf} is part {int(part['number'])} of {count}, {others} missing",
            where=f"the first that is not there is {missing[0] if missing else gguf.name}",
            fix="copy or download all parts into one folder, with their names",
        )
    return parts


def join_gguf(parts: Sequence[Path], path: Path) -> None:
    """Join parts into one file: the settings of the first part, the tensors of all.

    Args:
        parts: The parts, in order.
        path: The file to write.

    Raises:
        IncompatibleData: They are not the parts of one model.
        OSError: The disk is full.
    """
    import gguf

    readers = [read_gguf(part) for part in parts]
    fields = readers[0].fields
    architecture = fields.get("general.architecture")
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    promised = fields.get("split.tensors.count")
    count = int(promised.contents()) if promised else len(names)
    # A tensor in two parts, or more or fewer than promised: they are of different models.
    if architecture is None or len(names) != count or len(set(names)) != len(names):
        raise IncompatibleData(
            f"{parts[0]} and its siblings are not the parts of one model",
            where=f"they hold {len(set(names))} tensors, the first part promises {count}",
            fix="copy or download all parts again",
        )
    writer = gguf.GGUFWriter(path, str(architecture.contents()))
    for name, field in fields.items():
        if name == "general.architecture" or name.startswith(("GGUF.", "split.")):
            continue  # the writer sets these itself; split.* would describe a part
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=item)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    # The descriptions of all tensors come before the first byte of data. The data stay mapped in
    # the parts: one tensor at a time is copied.
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def read_gguf(path: Path) -> Any:
    """Open a GGUF file.

    Raises:
        IncompatibleData: It is not a GGUF file, or is damaged.
    """
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (*UNREADABLE, AssertionError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> IncompatibleData:
    """Return the error for a GGUF file that cannot be read."""
    lines = str(error).splitlines()
    return IncompatibleData(
        f"{path} cannot be read as a GGUF model",
        where=lines[0][:200] if lines else type(error).__name__,
        fix="copy the file again, or give a folder of safetensors",
    )
