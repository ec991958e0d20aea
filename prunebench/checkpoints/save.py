"""Save the output of a run: the pruned checkpoint with its model card, and a mask file."""

from __future__ import annotations

import contextlib
import itertools
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunebench.checkpoints.model_card import model_card
from prunebench.errors import SaveError, UsageError
from prunebench.files import atomic_file, atomic_folder, link_or_copy, require_writable
from prunebench.models.carried import (
    add_carried,
    carried_tensors,
    clean_tokenizer_config,
    copy_files,
    write_config,
    write_index,
    write_stored,
)
from prunebench.models.disk import DiskWeights
from prunebench.models.linears import Linear, find_blocks
from prunebench.models.load import load_config, quiet_transformers
from prunebench.models.removal import same_logits
from prunebench.models.safetensors_files import StoredTensor, stored_tensors, weight_files
from prunebench.models.smaller_config import fields_without
from prunebench.models.source import LocalModel
from prunebench.models.stored_model import StoredModel, kept_buffers, stored_model
from prunebench.models.tensor_files import write_tensors
from prunebench.models.verify import expected_of_model, require_saved
from prunebench.models.weights import WeightStore, weights_of
from prunebench.progress import Progress
from prunebench.results.schema import Result

RESULT_NAME = "prunebench.json"
"""Name of the copy of the result in a checkpoint's folder."""


def check_target(path: Path, *, need_bytes: int, replace: bool, folder: bool) -> None:
    """Check, before pruning, that a file or folder can be written.

    Args:
        path: The file or folder.
        need_bytes: Its size, to check the free space.
        replace: Whether an existing one may be replaced.
        folder: Whether it is a folder.

    Raises:
        UsageError: It exists, and `replace` is False; or it is a file where a folder is needed, or
            the other way round.
        SaveError: It cannot be written.
    """
    taken = any(path.iterdir()) if folder and path.is_dir() else path.exists()
    if taken and folder and path.is_file():
        raise UsageError(f"{path} is a file, not a folder", fix="name another folder")
    if taken and not folder and path.is_dir():
        raise UsageError(f"{path} is a folder, not a file", fix="name a file in it")
    if taken and not replace:
        raise UsageError(
            f"{path} exists already", fix="name another path, or add --force to replace it"
        )
    require_writable(path.absolute().parent, need_bytes=need_bytes)


def save_model(
    model: nn.Module,
    local: LocalModel,
    path: Path,
    *,
    result: Result,
    replace: bool,
    progress: Progress,
) -> None:
    """Save a folder that `from_pretrained` loads, with zeros stored in place and a model card.

    Config, tokenizer, and what the text model does not use are copied from the dense model. The
    folder is read again and verified before it gets its name.

    Args:
        model: The pruned model.
        local: The dense model.
        path: The folder to write.
        result: Of the run.
        replace: Whether an existing folder may be replaced.
        progress: Shows the stages.

    Raises:
        SaveError: It could not be written, or differs from what was scored; `path` is unchanged.
    """
    assert result.model is not None
    removal = result.sparsity.removal if result.sparsity else None
    fields: dict[str, Any] = {}
    carried: dict[str, StoredTensor] = {}
    source = stored_model(model, stored_tensors(weight_files(local.path)))
    if removal is None:
        carried = carried_tensors(source)
    else:  # nothing is carried over: `run.plan` has refused it
        fields = fields_without(load_config(local.path), removal.blocks, removal.blocks_before)
    sha256, dtype = str(result.model.evaluated_sha256), result.model.dtype
    with atomic_folder(path, replace=replace, exclusive=True) as part, quiet_transformers():
        with progress.stage("save", detail=str(path)):
            weights = weights_of(model)
            if isinstance(weights, DiskWeights):
                save_shards(model, weights, part, source)
            else:
                _save_resident(model, part)
            if carried:
                _require_names_of_source(part, source, path)
                add_carried(part, carried)
            write_config(local.path, part, model, dtype=dtype, fields=fields)
            copy_files(local.path, part)
            if local.source.kind in ("gguf", "wheel"):
                clean_tokenizer_config(part)
            (part / "README.md").write_text(model_card(result, name=str(path)), encoding="utf-8")
            (part / RESULT_NAME).write_text(result.to_json(), encoding="utf-8")
        expected = expected_of_model(model, sha256, dtype, carried)
        require_saved(part, expected, name=path, progress=progress)
        if removal is not None:
            _require_same_model(model, part, path)
    if carried:
        size = sum(tensor.stop - tensor.start for tensor in carried.values())
        progress.note(
            f"  {len(carried)} tensors ({size / 1e6:,.1f} MB) that the text model does not use "
            f"were carried over as they are, the first is {min(carried)}"
        )


def _require_same_model(model: nn.Module, folder: Path, name: Path) -> None:
    """Raise `SaveError` unless the config of a folder builds a model with the same logits.

    The weights are equal, which `require_saved` has checked.
    """
    if not same_logits(model, load_config(folder)):
        raise SaveError(
            f"{name} was not saved: its config describes another model than the one scored",
            where="the logits differ, with the same weights",
            fix="report this architecture with this message",
        )


def _save_resident(model: Any, folder: Path) -> None:
    """Write the weights with `save_pretrained`, without its config files.

    It refuses some generation settings that published models have, so they are reset meanwhile.
    """
    from transformers import GenerationConfig

    settings = model.generation_config  # restored below: the caller's model is unchanged
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = settings
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)


def _require_names_of_source(folder: Path, source: StoredModel, name: Path) -> None:
    """Raise `SaveError` if transformers wrote other names than those of the dense model's files."""
    others = sorted(stored_tensors(weight_files(folder)).keys() - source.names)
    if others:
        raise SaveError(
            f"{name} cannot be saved with what the text model does not use",
            where=f"transformers wrote {others[0]}, which is not a name in its source",
            fix="use --weights disk, which keeps the names, or run without --save-model",
        )


def save_shards(model: Any, weights: DiskWeights, folder: Path, source: StoredModel) -> None:
    """Write a model whose blocks are on disk: one shard per block, one for the rest, and the index.

    The files of pruned blocks are hard-linked if the file system allows it, else copied.

    Args:
        model: The model.
        weights: Its blocks on disk.
        folder: The folder to write to.
        source: The tensors of the dense model, whose names in the files are used.

    Raises:
        OSError: The disk is full.
    """
    prefix, blocks = find_blocks(model)
    count = len(blocks) + 1
    buffers = {name: model.get_buffer(name) for name in kept_buffers(model)}
    outside = {
        name: tensor
        for name, tensor in {**dict(model.named_parameters()), **buffers}.items()
        if not name.startswith(f"{prefix}.")
    }
    names = [f"model-{shard + 1:05d}-of-{count:05d}.safetensors" for shard in range(count)]
    write_tensors(folder / names[0], _renamed(outside, source))
    for index, name in enumerate(names[1:]):  # shard 1 has the rest, shard i + 2 block i
        pruned = weights.pruned_file(index)
        if pruned is None:
            with weights.open_block(index):
                write_tensors(folder / name, _renamed(weights.tensors_of(index), source))
            continue
        tensors = stored_tensors([pruned])
        renamed = _renamed(tensors, source)
        if renamed.keys() == tensors.keys():  # the file can be used as it is
            link_or_copy(pruned, folder / name)
        else:
            write_stored(folder / name, renamed)
    write_index(folder, names)


def _renamed(tensors: Mapping[str, Any], source: StoredModel) -> dict[str, Any]:
    """Rename tensors of the model to their names in the files of the dense model."""
    # A tied tensor may have several names in the files: the first is used.
    return {source.keys[name][0]: tensor for name, tensor in tensors.items()}


def save_masks(linears: list[Linear], path: Path, *, weights: WeightStore | None = None) -> None:
    """Write the keep masks of all prunable parameters of a loaded model, as `models.masks` reads.

    Args:
        linears: All of the model, in order.
        path: The file to write.
        weights: Opens the blocks of a model on disk; None if all weights are in memory.

    Raises:
        SaveError: It could not be written.
    """
    _write_masks(path, _masks_of(linears, weights))


def _masks_of(
    linears: list[Linear], weights: WeightStore | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and packed keep mask of each parameter; experts of a stack share one."""
    for index, members in itertools.groupby(linears, lambda linear: linear.block_index):
        with weights.open_block(index) if weights else contextlib.nullcontext():
            parameters = {
                linear.parameter_name: getattr(linear.module, linear.attribute)
                for linear in members
            }
            for name, parameter in parameters.items():
                # [ceil(size / 8)], the first weight in the highest bit; -0.0 counts as pruned
                yield name, np.packbits((parameter.detach() != 0).cpu().numpy().reshape(-1))


def save_stored_masks(tensors: Iterable[StoredTensor], path: Path) -> None:
    """Write the same file as `save_masks` from weight files, reading a piece at a time.

    Args:
        tensors: The prunable parameters, from `stored_tensors` or `stored_model`.
        path: The file to write.

    Raises:
        SaveError: It could not be written.
        IncompatibleData: A weight file has become shorter.
    """
    _write_masks(path, ((tensor.name, _packed(tensor)) for tensor in tensors))


def _packed(stored: StoredTensor) -> np.ndarray:
    """Return the keep mask of a stored tensor, 8 weights a byte, [ceil(size / 8)]."""
    dtype = getattr(torch, stored.dtype)
    pieces = [
        np.packbits((torch.frombuffer(piece, dtype=dtype) != 0).numpy())
        for piece in stored.pieces(align=8 * dtype.itemsize)  # whole bytes of the mask
    ]
    return np.concatenate(pieces)


def _write_masks(path: Path, masks: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write what `numpy.savez_compressed` would, one entry at a time, and without timestamps."""
    with atomic_file(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, packed in masks:
            # Its default date is 1980, so the same masks give the same file.
            entry = zipfile.ZipInfo(f"{name}.mask.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            # The size is not known in advance, and may be more than the 2 GiB of a plain entry.
            with archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, packed, allow_pickle=False)
