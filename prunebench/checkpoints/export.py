"""Export a checkpoint of `run --save-model` as a folder to publish.

    README.md        model card: model-index, method, calibration, hashes, the command
    prunebench.json  the result
    recipe.toml      the run, for `run --recipe`
    masks.npz        the keep masks, packed bits, as `run --save-masks` writes them
    *                weights, config and tokenizer, unchanged; with `to="packed24"` the 2:4
                     matrices packed, with `to="dense"` as plain safetensors again

The weights are hashed and must be those that the result scored, so that a card never describes
other weights.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

from prunebench.allocators.allocation import save_allocation
from prunebench.checkpoints.find import require_scored
from prunebench.checkpoints.model_card import model_card
from prunebench.checkpoints.packed24 import (
    INDEXES,
    Packing,
    copy_companions,
    dense_config,
    dense_tensors,
    kind_of,
    require_same,
    write_dense,
    write_packed,
)
from prunebench.checkpoints.packed24_index import write_settings
from prunebench.checkpoints.recipe_text import ALLOCATION_NAME, RECIPE_NAME, recipe_text
from prunebench.checkpoints.save import RESULT_NAME, check_target, save_stored_masks
from prunebench.errors import IncompatibleData, MissingResource, SaveError, UsageError
from prunebench.files import atomic_folder, link_or_copy
from prunebench.models.carried import TEMPLATES, copy_templates
from prunebench.models.checkpoint_keys import check_tensors
from prunebench.models.linears import Linear, find_linears
from prunebench.models.load import load_config, skeleton
from prunebench.models.safetensors_files import StoredTensor, other_files
from prunebench.models.stored_config import require_unquantized, store_config
from prunebench.models.stored_model import StoredModel, stored_model
from prunebench.models.verify import expected_of_folder, require_saved
from prunebench.progress import Progress
from prunebench.results.schema import Result
from prunebench.results.store import Damaged, read_copy
from prunebench.sparsity import Sparsity

MASKS_NAME = "masks.npz"
_KINDS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_WRITTEN = ("README.md", RECIPE_NAME, MASKS_NAME, ALLOCATION_NAME)
_STORAGE = {
    "dense": "zeros are stored in place: the files are as large as the dense model's",
    "packed24": "2:4 matrices are packed (values and 4-bit codes, 0.5625 of the dense bytes), and "
    "stay so in memory; `prunebench export DIR -o PLAIN --to dense` writes plain safetensors",
    "sparse-24-bitmask": "2:4 matrices are stored as sparse-24-bitmask",
    "fp8": "matrices are stored as float8, with a scale a block",
}
To = Literal["dense", "packed24"]
_ABOUT = {
    RESULT_NAME: "the result: every setting, the sparsity of every layer, cost, versions",
    RECIPE_NAME: f"the run, for `prunebench run --recipe {RECIPE_NAME}`",
    MASKS_NAME: "the keep masks: `numpy.packbits`, one entry a parameter, row-major",
    ALLOCATION_NAME: "the ratio of every layer, which the recipe reads",
}


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    Attributes:
        folder: The folder.
        result: Of the checkpoint; None if it had none.
        sizes: Bytes of every file, by name.
        linked: Files that are hard links to those of the checkpoint.
        left_out: Files of the checkpoint that were not copied.
        packing: Report of packing; None if nothing was packed.
    """

    folder: Path
    result: Result | None
    sizes: dict[str, int]
    linked: tuple[str, ...]
    left_out: tuple[str, ...]
    packing: Packing | None = field(default=None)


def read_checkpoint(folder: Path) -> Result:
    """Return the result in a checkpoint's folder.

    Raises:
        IncompatibleData: The folder has none, a damaged one, or that of an unfinished run.
    """
    path = folder / RESULT_NAME
    if not path.is_file():
        raise IncompatibleData(
            f"{folder} says nothing of how it was made",
            where=f"it has no {RESULT_NAME}",
            fix="export a folder that prunebench run --save-model wrote",
        )
    result = read_copy(path)
    if isinstance(result, Damaged):
        raise IncompatibleData(f"{path} is damaged", where=result.reason)
    if result.status != "ok" or None in (result.model, result.method, result.sparsity):
        raise IncompatibleData(f"{path} is not the result of a finished run")
    return result


def no_weights(result: Result) -> MissingResource:
    """Return the error for exporting a result instead of its checkpoint."""
    words = shlex.split(result.command)
    # The option as two words, or as one with `=`.
    saved = next((b for a, b in zip(words, words[1:], strict=False) if a == "--save-model"), None)
    saved = saved or next(
        (w.partition("=")[2] for w in words if w.startswith("--save-model=")), None
    )
    if saved and Path(saved).is_dir():
        fix = f"it saved them as {saved}: export that folder"
    else:
        fix = f"make them: {result.command}" + ("" if saved else " --save-model DIR")
    return MissingResource(
        f"{result.id} is a result, and a result holds no weights",
        where="only a folder written by run --save-model can be exported",
        fix=fix,
    )


def export(
    source: Path,
    target: Path,
    *,
    replace: bool,
    progress: Progress,
    to: To | None = None,
    repository: str | None = None,
) -> Exported:
    """Write a folder to publish.

    Args:
        source: A folder that `run --save-model` wrote.
        target: The folder to write, completely or not at all.
        replace: Whether an existing folder may be replaced.
        progress: Shows the stages.
        to: How to store the weights; None keeps the format. If given, any model folder can be the
            source; without a result it gets no card.
        repository: Where it will be pushed to, for its card; None if nowhere.

    Raises:
        IncompatibleData: The source is damaged, or its weights are not those that were scored.
        UsageError: The target exists.
        SaveError: It cannot be written.
    """
    stored = kind_of(source)
    if to is not None and not (source / RESULT_NAME).is_file():
        return _convert(source, target, to, replace=replace, progress=progress)
    to = None if to == stored else to
    result = read_checkpoint(source)
    assert result.model is not None
    tensors = dense_tensors(source)
    _check_target(source, target, replace=replace)
    model = skeleton(load_config(source))
    check_tensors(model, tensors)
    source_model, linears = stored_model(model, tensors), find_linears(model)
    sha256 = str(result.model.evaluated_sha256)
    expected = expected_of_folder(source_model, sha256, result.model.dtype)
    others = other_files(source)
    copied = [path for path in sorted(source.iterdir()) if _is_copied(path) and path not in others]
    if to is not None:
        # They are written below, in the other format.
        copied = [path for path in copied if not _is_weight(path)]
    packing = None
    with atomic_folder(target, replace=replace, exclusive=True) as part:
        with progress.stage("copy", detail=f"{len(copied)} files"):
            linked = [path.name for path in copied if link_or_copy(path, part / path.name)]
            copy_templates(source, part)
        if to is not None:
            packing = _write_weights(source, tensors, part, to, progress=progress)
        elif stored == "packed24":
            write_settings(part)  # those of a folder that was packed before there were any
        # Of the copy, not of the source: a file that changed while it was copied is noticed.
        try:
            require_saved(part, expected, name=target, progress=progress, read=dense_tensors)
        except SaveError as error:
            _raise_cause(source, source_model, result, packing, error)
        about = _describe(part, result, source_model, linears, progress=progress)
        _write_card(part, result, about, name=repository or str(target), kind=to or stored)
    left_out = [
        path
        for path in sorted(source.iterdir())
        if path not in copied and (path in others or not _is_weight(path))
    ]
    names_left = (p.name for p in left_out if p.name not in (*_WRITTEN, TEMPLATES))
    return Exported(target, result, _sizes(target), tuple(linked), tuple(names_left), packing)


def _write_weights(
    source: Path, tensors: Mapping[str, StoredTensor], part: Path, to: To, *, progress: Progress
) -> Packing | None:
    """Write weights in another format, and the config that goes with it."""
    if to == "packed24":
        return write_packed(tensors, part, progress=progress)
    with progress.stage("write", detail="dense safetensors"):
        config = dense_config(source)
        if config is not None:
            store_config(part, config)
        write_dense(tensors, part)
    return None


def _write_card(part: Path, result: Result, about: dict[str, str], *, name: str, kind: str) -> None:
    packed = kind == "packed24"
    card = model_card(result, about, name=name, storage=_STORAGE[kind], packed=packed)
    (part / "README.md").write_text(card, encoding="utf-8")


def _describe(
    part: Path,
    result: Result,
    source_model: StoredModel,
    linears: list[Linear],
    *,
    progress: Progress,
) -> dict[str, str]:
    """Write recipe and masks to a folder; return what the files are, by name, for the card."""
    written = [RESULT_NAME, RECIPE_NAME]
    recipe = recipe_text(result)
    if result.spec.allocation == "file":
        _write_allocation(part / ALLOCATION_NAME, result, linears)
        written.append(ALLOCATION_NAME)
    (part / RECIPE_NAME).write_text(recipe, encoding="utf-8")
    removes = result.sparsity is not None and result.sparsity.removal is not None
    if result.spec.method != "dense" and not removes:
        with progress.stage("masks", detail=f"{len(linears)} layers"):
            names = dict.fromkeys(linear.parameter_name for linear in linears)
            save_stored_masks((source_model.tensors[name] for name in names), part / MASKS_NAME)
        written.append(MASKS_NAME)
    return {name: _ABOUT[name] for name in written}


def _raise_cause(
    source: Path, model: StoredModel, result: Result, packing: Packing | None, error: SaveError
) -> NoReturn:
    """Raise the reason why an exported folder differs from what was scored.

    Args:
        source: The checkpoint.
        model: Its tensors.
        result: Of the run.
        packing: Report of packing, if it was packed.
        error: Of `require_saved`.

    Raises:
        IncompatibleData: The source differs too, or cannot be packed without a change.
        SaveError: Writing failed.
    """
    # a source that no longer has the hash of its result was changed before the export
    require_scored(source, model, result)
    if packing and packing.negative_zeros:
        raise IncompatibleData(
            f"{source} cannot be packed as it was scored",
            where=f"{packing.negative_zeros:,} of its zeros are -0.0, which is packed as +0.0",
            fix="export it without --to packed24",
        ) from error
    raise error


def _convert(source: Path, target: Path, to: To, *, replace: bool, progress: Progress) -> Exported:
    """Convert the weights of a folder without a result; the other files are copied."""
    load_config(source)
    if kind_of(source) == "dense":
        require_unquantized(source)
    tensors = dense_tensors(source)
    _check_target(source, target, replace=replace)
    with atomic_folder(target, replace=replace, exclusive=True) as part:
        copy_companions(source, part)
        packing = _write_weights(source, tensors, part, to, progress=progress)
        require_same(source, tensors, part, name=target, progress=progress)
    return Exported(target, None, _sizes(target), (), (), packing)


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _is_weight(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name in INDEXES


def _is_copied(path: Path) -> bool:
    """Return whether a file is copied: it belongs to the model, and export does not write it."""
    matches = any(path.match(kind) for kind in _KINDS) and not path.name.startswith(".")
    return path.is_file() and matches and path.name not in _WRITTEN


def _check_target(source: Path, target: Path, *, replace: bool) -> None:
    """Refuse a target that would replace the checkpoint, exists, or cannot be written."""
    checkpoint, folder = source.resolve(), target.resolve()
    # --force replaces the target: it must not be the source, nor a folder that holds it.
    if folder == checkpoint or folder in checkpoint.parents:
        raise UsageError(
            f"{target} is or holds the checkpoint itself", fix="name another folder with -o"
        )
    # On the same file system files are hard-linked, and need no space.
    size = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    linked = parent.stat().st_dev == source.stat().st_dev
    check_target(target, need_bytes=1 << 24 if linked else size, replace=replace, folder=True)


def _write_allocation(path: Path, result: Result, linears: list[Linear]) -> None:
    assert result.sparsity is not None
    ratios = {layer.name: Sparsity.parse(layer.requested).ratio for layer in result.sparsity.layers}
    save_allocation(path, ratios, linears)
