"""What a run leaves besides its row: a pruned checkpoint with its card, and a file of masks."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunebench.errors import UsageError
from prunebench.files import atomic_file, atomic_folder, require_writable
from prunebench.models.card import model_card
from prunebench.models.linears import Linear
from prunebench.models.load import quiet_transformers
from prunebench.models.safetensors_files import StoredTensor
from prunebench.results.schema import Result

RESULT_NAME = "prunebench.json"
"""The copy of the result in a checkpoint's folder."""


def check_target(path: Path, *, need_bytes: int, replace: bool, folder: bool) -> None:
    """Find out before the work whether a file or folder can be written at `path`.

    Raises:
        UsageError: Something is there already, and `replace` is False.
        SaveError: It cannot be written.
    """
    taken = any(path.iterdir()) if folder and path.is_dir() else path.exists()
    if taken and folder and path.is_file():
        raise UsageError(f"{path} is a file, a folder is wanted", fix="name another folder")
    if taken and not folder and path.is_dir():
        raise UsageError(f"{path} is a folder, a file is wanted", fix="name a file in it")
    if taken and not replace:
        raise UsageError(
            f"{path} exists already", fix="name another place, or add --force to replace it"
        )
    require_writable(path.absolute().parent, need_bytes=need_bytes)


def save_model(
    model: nn.Module, tokenizer: Any, path: Path, *, result: Result, replace: bool
) -> None:
    """Write a folder that plain transformers loads, zeros in place, with a model card.

    Raises:
        SaveError: It could not be written; nothing is left at `path`.
    """
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    with atomic_folder(path, replace=replace) as part, quiet_transformers():
        try:
            model.save_pretrained(part)  # type: ignore[operator]
            tokenizer.save_pretrained(part)
        except RuntimeError as error:  # safetensors reports a full disk as its own error
            raise OSError(28, str(error)) from error
        (part / "README.md").write_text(model_card(result), encoding="utf-8")
        (part / RESULT_NAME).write_text(result.to_json(), encoding="utf-8")


def save_masks(linears: list[Linear], path: Path) -> None:
    """Write the keep masks of all pruned parameters of a loaded model.

    The format is that of `models.masks`, in which the published MaskLLM masks come.

    Raises:
        SaveError: It could not be written.
    """
    parameters = {one.parameter_name: getattr(one.module, one.attribute) for one in linears}
    _write_masks(
        path,
        (
            (name, np.packbits((parameter.detach() != 0).cpu().numpy().reshape(-1)))
            for name, parameter in parameters.items()
        ),
    )


def save_stored_masks(tensors: Iterable[StoredTensor], path: Path) -> None:
    """Write the same file as `save_masks` from the weights' files, a piece in memory at a time.

    Raises:
        SaveError: It could not be written.
        IncompatibleData: A weight file has become shorter.
    """
    _write_masks(path, ((one.name, _packed(one)) for one in tensors))


def _packed(stored: StoredTensor) -> np.ndarray:
    dtype = getattr(torch, stored.dtype)
    pieces = [
        np.packbits((torch.frombuffer(piece, dtype=dtype) != 0).numpy())
        for piece in stored.pieces(align=8 * dtype.itemsize)  # whole bytes of bits
    ]
    return np.concatenate(pieces)


def _write_masks(path: Path, masks: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write what `numpy.savez_compressed` would, an entry at a time and with no dates in it."""
    with atomic_file(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, packed in masks:
            entry = zipfile.ZipInfo(f"{name}.mask.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, packed, allow_pickle=False)
