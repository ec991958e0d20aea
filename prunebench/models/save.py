"""What a run leaves besides its row: a pruned checkpoint with its card, and a file of masks."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunebench.errors import UsageError
from prunebench.files import atomic_file, atomic_folder, link_or_copy, require_writable
from prunebench.models.card import model_card
from prunebench.models.disk import DiskWeights
from prunebench.models.linears import Linear, find_blocks
from prunebench.models.load import quiet_transformers
from prunebench.models.safetensors_files import INDEX_NAME, StoredTensor, stored_tensors
from prunebench.models.tensor_files import write_tensors
from prunebench.models.weights import WeightStore, weights_of
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
    weights = weights_of(model)
    with atomic_folder(path, replace=replace) as part, quiet_transformers():
        if isinstance(weights, DiskWeights):
            save_shards(model, weights, part)
        else:
            model.save_pretrained(part)  # type: ignore[operator]
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(model_card(result), encoding="utf-8")
        (part / RESULT_NAME).write_text(result.to_json(), encoding="utf-8")


def save_shards(model: Any, weights: DiskWeights, folder: Path) -> None:
    """Write a model whose blocks are on disk: a shard a block, one for the rest, and the index.

    The files of pruned blocks are linked into the folder where the file system can, else copied.

    Raises:
        OSError: The disk is full.
    """
    prefix, blocks = find_blocks(model)
    count = len(blocks) + 1
    outside = {
        name: tensor
        for name, tensor in {**dict(model.named_parameters()), **_kept_buffers(model)}.items()
        if not name.startswith(f"{prefix}.")
    }
    where: dict[str, str] = {}
    size = 0
    for shard in range(count):
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        pruned = weights.pruned_file(shard - 1) if shard else None
        if pruned is not None:
            link_or_copy(pruned, folder / name)
        elif shard:
            with weights.open_block(shard - 1):
                write_tensors(folder / name, weights.tensors_of(shard - 1))
        else:
            write_tensors(folder / name, outside)
        for key, row in stored_tensors([folder / name]).items():
            where[key] = name
            size += row.stop - row.start
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True), "utf-8")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    generation = weights.source / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _kept_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    kept = set(model.state_dict())
    return {name: tensor for name, tensor in model.named_buffers() if name in kept}


def save_masks(linears: list[Linear], path: Path, *, weights: WeightStore | None = None) -> None:
    """Write the keep masks of all pruned parameters of a loaded model.

    The format is that of `models.masks`, in which the published MaskLLM masks come.

    Args:
        linears: All of the model, in order.
        path: Where to.
        weights: Where they are; by default in the model.

    Raises:
        SaveError: It could not be written.
    """
    _write_masks(path, _masks_of(linears, weights))


def _masks_of(
    linears: list[Linear], weights: WeightStore | None
) -> Iterator[tuple[str, np.ndarray]]:
    for index, mine in itertools.groupby(linears, lambda one: one.block_index):
        with weights.open_block(index) if weights else contextlib.nullcontext():
            parameters = {one.parameter_name: getattr(one.module, one.attribute) for one in mine}
            for name, parameter in parameters.items():
                yield name, np.packbits((parameter.detach() != 0).cpu().numpy().reshape(-1))


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
