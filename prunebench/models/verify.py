"""Verify every saved folder: read it again and compare it with the weights that were scored.

The files are hashed in pieces, as the model that transformers would load from them, so no second
model is in memory. A changed bit, a cast, a missing tensor or tie is an error, and the folder never
gets its final name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from prunebench.errors import PrunebenchError, SaveError
from prunebench.models.carried import carried_tensors
from prunebench.models.hashing import hash_buffers
from prunebench.models.load import load_config, skeleton
from prunebench.models.safetensors_files import (
    PACKED_INDEX,
    StoredTensor,
    check_weight_files,
    hash_stored,
    other_files,
    stored_tensors,
    weight_files,
)
from prunebench.models.stored_config import PACKED24, quantization_of
from prunebench.models.stored_model import StoredModel, stored_model
from prunebench.progress import Progress

Read = Callable[[Path], Mapping[str, StoredTensor]]
_UNLIKE = "was not saved: what was read back is not what was scored"


@dataclass(frozen=True)
class Expected:
    """Expected contents of a saved folder.

    Attributes:
        sha256: `hash_weights` of the parameters.
        dtype: The dtype in its config, e.g. `bfloat16`.
        buffers: Hash of each persistent buffer, by name in the model.
        carried: Tensors that the text model does not use, by name in the files.
    """

    sha256: str
    dtype: str
    buffers: Mapping[str, str]
    carried: Mapping[str, StoredTensor]


def read_dense(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder of plain safetensors.

    Raises:
        IncompatibleData: A file is missing, damaged, or not part of the model.
    """
    check_weight_files(folder)
    return stored_tensors(weight_files(folder))


def expected_of_model(
    model: nn.Module, sha256: str, dtype: str, carried: Mapping[str, StoredTensor]
) -> Expected:
    """Return the expected contents of the folder of a loaded model.

    Args:
        model: The model, in memory or with its blocks on disk.
        sha256: `hash_weights` of it.
        dtype: Of its parameters.
        carried: From `carried_tensors`.
    """
    return Expected(sha256, dtype, hash_buffers(model), carried)


def expected_of_folder(source: StoredModel, sha256: str, dtype: str) -> Expected:
    """Return the expected contents of a folder that is converted from another one.

    Args:
        source: The tensors of the other folder.
        sha256: Hash of its parameters.
        dtype: Of its parameters.
    """
    buffers = {
        name: hash_stored(source.tensors, [name])
        # What is in the files and no parameter is a persistent buffer.
        for name in source.tensors.keys() - {*source.parameters}
    }
    return Expected(sha256, dtype, buffers, carried_tensors(source))


def require_saved(
    folder: Path, expected: Expected, *, name: Path, progress: Progress, read: Read = read_dense
) -> StoredModel:
    """Read a folder that was just written and compare it with its expected contents.

    Args:
        folder: Its temporary name.
        expected: Its expected contents.
        name: Its final name, for messages.
        progress: Shows the stage.
        read: Returns the tensors of the folder, packed ones as if they were dense.

    Returns:
        The tensors that were read.

    Raises:
        SaveError: The contents differ, or cannot be read.
    """
    try:
        tensors = read(folder)
        total = sum(tensor.stop - tensor.start for tensor in tensors.values())
        with progress.stage("verify", total=total, detail=str(name), unit="B") as advance:
            # From the saved config: a config that no longer fits the weights is found too.
            model = skeleton(load_config(folder))
            saved = stored_model(model, tensors)
            dtype = str(model.config.dtype).removeprefix("torch.")  # from_pretrained casts to it
            difference = _difference(folder, dtype, saved, expected, advance)
    except Exception as error:  # anything that from_pretrained could raise
        reason = error.what if isinstance(error, PrunebenchError) else str(error)
        raise _unlike(name, f"it cannot be read: {reason}") from error
    if difference:
        raise _unlike(name, difference)
    return saved


def _unlike(name: Path, reason: str) -> SaveError:
    return SaveError(
        f"{name} {_UNLIKE}",
        where=reason.splitlines()[0][:300] if reason else "",
        fix="check the disk and try again; if it happens again, it is a bug of prunebench: "
        "report it with this message",
    )


def _difference(
    folder: Path,
    dtype: str,
    saved: StoredModel,
    expected: Expected,
    advance: Callable[[int], None],
) -> str:
    """Return the first difference between a folder and its expected contents, or ""."""
    method = quantization_of(folder)
    packed = method == PACKED24 and (folder / PACKED_INDEX).is_file()
    if method is not None and not packed:
        return f"config.json says quantized with {method}, and the weights are not"
    if dtype != expected.dtype:
        return f"config.json says {dtype}, the weights are {expected.dtype}"
    # Other programs might load it in place of the weights, or with them.
    strays = other_files(folder)
    if strays:
        return f"{strays[0].name} is beside the weights, and not part of them"
    if saved.missing:
        return f"{len(saved.missing)} tensors are missing, the first is {saved.missing[0]}"
    # The hash covers names, dtypes and shapes too: a cast or a lost tie changes it.
    digest = hash_stored(saved.tensors, saved.parameters, advance=advance)
    if digest != expected.sha256:
        return f"the weights hash to {digest[:16]}..., those scored to {expected.sha256[:16]}..."
    buffers = {
        name: hash_stored(saved.tensors, [name], advance=advance)
        for name in saved.tensors.keys() - {*saved.parameters}
    }
    for name in sorted({*buffers, *expected.buffers}):
        if buffers.get(name) != expected.buffers.get(name):
            return f"the buffer {name} has changed"
    return _carried_difference(saved, expected, advance)


def _carried_difference(
    saved: StoredModel, expected: Expected, advance: Callable[[int], None]
) -> str:
    unused = carried_tensors(saved)
    for key in sorted({*unused, *expected.carried}):
        if key not in unused:
            return f"{key}, which the text model does not use, was not carried over"
        if key not in expected.carried:
            return f"{key} is not part of the model, and was not in its source"
        if hash_stored(unused, [key], advance=advance) != hash_stored(expected.carried, [key]):
            return f"{key}, which the text model does not use, is not what it was"
    return ""
