"""Read and write tensors of safetensors files one at a time, without memory mapping.

Pages of a mapped file count as resident memory of the process, and the first access to each costs a
page fault; reading into a tensor costs neither. Files are hashed while they are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunebench.errors import IncompatibleData
from prunebench.models.safetensors_files import DTYPE_CODES, StoredTensor

_ALIGN = 4096  # offset of the first tensor's bytes


def read_tensor(
    stored: StoredTensor, dtype: torch.dtype, *, pin: bool = False, out: Tensor | None = None
) -> Tensor:
    """Read one tensor into host memory, cast to `dtype`; at most 16 MB are in memory twice.

    Args:
        stored: From `stored_tensors`.
        dtype: Of the result.
        pin: Whether to use page-locked memory, from which a GPU copies asynchronously.
        out: A contiguous tensor of that shape and `dtype` to read into; by default a new one.

    Raises:
        IncompatibleData: The file has become shorter.
    """
    stored_dtype = getattr(torch, stored.dtype)
    whole = torch.empty(stored.shape, dtype=dtype, pin_memory=pin) if out is None else out
    flat = whole.view(-1)  # [elements], shares memory with `whole`
    if stored_dtype == dtype and flat.numel():
        with stored.path.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            # bytes_of copies nothing here: the tensor is contiguous and on the CPU.
            _read_into(stream, memoryview(bytes_of(flat)), stored)
        return whole
    at = 0
    for piece in stored.pieces(align=stored_dtype.itemsize):
        part = torch.frombuffer(piece, dtype=stored_dtype)  # [elements of the piece]
        flat[at : at + len(part)].copy_(part)
        at += len(part)
    return whole


def _read_into(stream: Any, target: memoryview, stored: StoredTensor) -> None:
    done = 0
    while done < len(target):  # a read of an unbuffered file may return less than was asked for
        count = stream.readinto(target[done:])
        if not count:
            raise IncompatibleData(
                f"{stored.path} is damaged",
                where=f"{stored.name} ends early",
                fix="copy or download the file again",
            )
        done += count


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file one tensor at a time; return its SHA-256.

    Args:
        path: A temporary name: the caller renames the file when it is complete.
        tensors: By name, on any device.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    # The format allows spaces after the JSON; 8 bytes for the length come before it.
    text += b" " * (-(len(text) + 8) % _ALIGN)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as stream:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            stream.write(piece)
        for tensor in tensors.values():
            data = memoryview(bytes_of(tensor))
            digest.update(data)
            while data:  # an unbuffered write may be partial
                data = data[stream.write(data) or 0 :]
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Any:
    """Return the bytes of a tensor, row-major, as a numpy array of uint8."""
    # Flat first: a 0-dim tensor cannot be viewed as another dtype.
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
