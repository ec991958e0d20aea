"""From a checkpoint that `run --save-model` wrote to a folder worth publishing.

    README.md        the card: model-index, method, calibration, hashes, the command
    prunebench.json  the result
    recipe.toml      the run, for `run --recipe`
    masks.npz        the keep masks, packed bits, as `run --save-masks` writes them
    *                weights, config and tokenizer, as they were; with `to="packed24"` the 2:4
                     matrices packed, with `to="dense"` as plain safetensors again

The weights in the files are hashed and must be those that the result scored: a card never describes
other weights.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from prunebench.allocators.allocation import save_allocation
from prunebench.calibration.texts import texts
from prunebench.checkpoints.model_card import model_card
from prunebench.checkpoints.packed24 import (
    Packing,
    copy_companions,
    dense_tensors,
    kind_of,
    require_same,
    write_dense,
    write_packed,
)
from prunebench.checkpoints.save import RESULT_NAME, check_target, save_stored_masks
from prunebench.errors import IncompatibleData, MissingResource, SaveError, UsageError
from prunebench.files import atomic_folder, link_or_copy
from prunebench.models.carried import TEMPLATES, copy_templates
from prunebench.models.checkpoint_keys import check_tensors
from prunebench.models.linears import Linear, find_linears
from prunebench.models.load import load_config, skeleton
from prunebench.models.safetensors_files import (
    INDEX_NAME,
    PACKED_INDEX,
    hash_stored,
    other_files,
)
from prunebench.models.stored_config import require_unquantised
from prunebench.models.stored_model import StoredModel, stored_model
from prunebench.models.verify import expected_of_folder, require_saved
from prunebench.options import options_of
from prunebench.progress import Progress
from prunebench.results.schema import Result
from prunebench.results.store import Damaged, read_copy
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec

MASKS_NAME, RECIPE_NAME, ALLOCATION_NAME = "masks.npz", "recipe.toml", "allocation.json"
_KINDS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_WRITTEN = ("README.md", RECIPE_NAME, MASKS_NAME, ALLOCATION_NAME)
_STORAGE = {
    "dense": "zeros are stored in place: the files are as large as the dense model's",
    "packed24": "2:4 matrices are packed (values and 4-bit codes, 0.5625 of the dense bytes): run "
    "them with `prunebench`, or get plain safetensors with `prunebench export DIR --to dense`",
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
    """What was written.

    Attributes:
        sizes: Bytes of every file, by name.
        linked: Files that share their bytes with the checkpoint (hard links).
        left_out: Files of the checkpoint that were not taken.
        packing: What packing did, where the matrices were packed.
    """

    folder: Path
    result: Result | None
    sizes: dict[str, int]
    linked: tuple[str, ...]
    left_out: tuple[str, ...]
    packing: Packing | None = field(default=None)


def read_checkpoint(folder: Path) -> Result:
    """Return the result of a checkpoint's folder.

    Raises:
        IncompatibleData: The folder has none, or a damaged one.
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
    """Return the error for a result that was named instead of its checkpoint."""
    words = shlex.split(result.command)
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
    source: Path, target: Path, *, replace: bool, progress: Progress, to: To | None = None
) -> Exported:
    """Write the folder.

    Args:
        source: A folder that `run --save-model` wrote.
        target: The folder to write; a whole one or none is left there.
        replace: Whether it may replace what is there.
        progress: Hears of the stages.
        to: How the weights are stored; None is as they are now. With one, any folder of a model
            is taken, also one that nobody here has scored: it then gets no card.

    Raises:
        IncompatibleData: The source is damaged, or its weights are not those that were scored.
        UsageError: There is something at the target.
        SaveError: It cannot be written.
    """
    stored = kind_of(source)
    to = None if to == stored else to
    if to is not None and not (source / RESULT_NAME).is_file():
        return _convert(source, target, to, replace=replace, progress=progress)
    result = read_checkpoint(source)
    assert result.model is not None
    tensors = dense_tensors(source)
    _check_target(source, target, replace=replace)
    model = skeleton(load_config(source))
    check_tensors(model, tensors)
    here, linears = stored_model(model, tensors), find_linears(model)
    sha256 = str(result.model.evaluated_sha256)
    expected = expected_of_folder(here, sha256, result.model.dtype)
    others = other_files(source)
    wanted = [path for path in sorted(source.iterdir()) if _is_taken(path) and path not in others]
    if to is not None:
        wanted = [path for path in wanted if not _is_weight(path)]
    packing = None
    with atomic_folder(target, replace=replace, exclusive=True) as part:
        with progress.stage("copy", detail=f"{len(wanted)} files"):
            linked = [path.name for path in wanted if link_or_copy(path, part / path.name)]
            copy_templates(source, part)
        if to == "packed24":
            packing = write_packed(tensors, part, progress=progress)
        elif to == "dense":
            with progress.stage("write", detail="dense safetensors"):
                write_dense(tensors, part)
        try:
            require_saved(part, expected, name=target, progress=progress, read=dense_tensors)
        except SaveError as error:
            _blame(source, here, result, packing, error)
        _describe(part, result, here, linears, storage=_STORAGE[to or stored], progress=progress)
    left_out = [
        path
        for path in sorted(source.iterdir())
        if path not in wanted and (path in others or not _is_weight(path))
    ]
    names_left = (p.name for p in left_out if p.name not in (*_WRITTEN, TEMPLATES))
    return Exported(target, result, _sizes(target), tuple(linked), tuple(names_left), packing)


def _describe(
    part: Path,
    result: Result,
    here: StoredModel,
    linears: list[Linear],
    *,
    storage: str,
    progress: Progress,
) -> None:
    """Write recipe, masks and card into a folder."""
    written = [RESULT_NAME, RECIPE_NAME]
    recipe = recipe_text(result)
    if result.spec.allocation == "file":
        _write_allocation(part / ALLOCATION_NAME, result, linears)
        written.append(ALLOCATION_NAME)
    (part / RECIPE_NAME).write_text(recipe, encoding="utf-8")
    if result.spec.method != "dense":
        with progress.stage("masks", detail=f"{len(linears)} layers"):
            names = dict.fromkeys(linear.parameter_name for linear in linears)
            save_stored_masks((here.tensors[name] for name in names), part / MASKS_NAME)
        written.append(MASKS_NAME)
    about = {name: _ABOUT[name] for name in written}
    card = model_card(result, about, storage=storage)
    (part / "README.md").write_text(card, encoding="utf-8")


def _blame(
    source: Path, here: StoredModel, result: Result, packing: Packing | None, error: SaveError
) -> NoReturn:
    """Say whose fault it is that a folder does not hold what was scored.

    Raises:
        IncompatibleData: The source does not hold it either, or packing cannot.
        SaveError: The writing went wrong.
    """
    assert result.model is not None
    digest = "" if here.missing else hash_stored(here.tensors, here.parameters)
    if digest != result.model.evaluated_sha256:
        what = f"they hash to {digest[:16]}..." if digest else f"{here.missing[0]} is missing"
        raise IncompatibleData(
            f"the weights in {source} are not those that were scored",
            where=f"{what}, the result {result.id} scored {result.model.evaluated_sha256[:16]}...",
            fix="export the folder as run --save-model wrote it, or run it again",
        ) from error
    if packing and packing.negative_zeros:
        raise IncompatibleData(
            f"{source} cannot be packed as it was scored",
            where=f"{packing.negative_zeros:,} of its zeros are -0.0, which is packed as +0.0",
            fix="export it without --to packed24",
        ) from error
    raise error


def _convert(source: Path, target: Path, to: To, *, replace: bool, progress: Progress) -> Exported:
    """Store the weights of a folder without a result in another way; the rest is copied."""
    load_config(source)
    if kind_of(source) == "dense":
        require_unquantised(source)
    tensors = dense_tensors(source)
    _check_target(source, target, replace=replace)
    packing = None
    with atomic_folder(target, replace=replace, exclusive=True) as part:
        copy_companions(source, part)
        if to == "packed24":
            packing = write_packed(tensors, part, progress=progress)
        else:
            with progress.stage("write", detail="dense safetensors"):
                write_dense(tensors, part)
        require_same(source, tensors, part, name=target, progress=progress)
    return Exported(target, None, _sizes(target), (), (), packing)


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _is_weight(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name in (INDEX_NAME, PACKED_INDEX)


def _is_taken(path: Path) -> bool:
    """Whether a file belongs to a model; what we write ourselves is written anew."""
    fits = any(path.match(kind) for kind in _KINDS) and not path.name.startswith(".")
    return path.is_file() and fits and path.name not in _WRITTEN


def _check_target(source: Path, target: Path, *, replace: bool) -> None:
    here, there = source.resolve(), target.resolve()
    if there == here or there in here.parents:
        raise UsageError(
            f"{target} is or holds the checkpoint itself", fix="name another folder with -o"
        )
    size = sum(path.stat().st_size for path in source.iterdir() if path.is_file())
    parent = next(path for path in (there, *there.parents) if path.exists())
    linked = parent.stat().st_dev == source.stat().st_dev
    check_target(target, need_bytes=1 << 24 if linked else size, replace=replace, folder=True)


def _write_allocation(path: Path, result: Result, linears: list[Linear]) -> None:
    assert result.sparsity is not None
    ratios = {one.name: Sparsity.parse(one.requested).ratio for one in result.sparsity.layers}
    save_allocation(path, ratios, linears)


# ---------------------------------------------------------------- the recipe


def recipe_text(result: Result) -> str:
    """Return a TOML recipe that repeats a run: the same spec, where the same data is there.

    Texts of the catalogue are named with the place that they came from. Files of the user's are
    named by their hash, and a comment says so: a recipe of another text must not run by mistake.
    """
    spec, notes = result.spec, [f"repeats {result.id}: prunebench run --recipe {RECIPE_NAME}"]
    values: dict[str, Any] = {"method": spec.method, "model": _model_name(result, notes)}
    values |= {"sparsity": spec.sparsity, "dtype": spec.dtype, "allocation": spec.allocation}
    if spec.allocation == "file":
        values["allocation"] = f"file:{ALLOCATION_NAME}"
    if spec.within_block:
        values["within_block"] = spec.within_block
    if spec.calibration and spec.calibration_origin:
        values["calibration"] = _text_name(spec.calibration, spec.calibration_origin, notes)
        values["calibration_samples"] = spec.calibration_samples
        values["seqlen"] = spec.seqlen
    values["ppl"] = [
        _text_name(*pair, notes) for pair in zip(spec.ppl, spec.ppl_origins, strict=True)
    ]
    values["ppl_seqlen"] = spec.ppl_seqlen
    for name, option in options_of(RunSpec).items():
        value = getattr(spec, name)
        unread = value is None  # data that the method does not read
        if option.about.given and name not in values and not unread and value != option.value:
            values[name] = value
    values["seed"] = spec.seed
    options = dict(spec.method_options)
    if result.training is not None:
        one = result.training
        options["train_data"] = _text_name(one.text, one.origin, notes)
    lines = [*(f"# {note}" for note in notes), *_toml(values)]
    if options:
        lines += ["", "[set]", *_toml(options)]
    if spec.allocation_options and spec.allocation != "file":
        lines += ["", "[set.allocation]", *_toml(spec.allocation_options)]
    return "\n".join([*lines, ""])


def _model_name(result: Result, notes: list[str]) -> str:
    assert result.model is not None
    name, revision = result.spec.model, result.model.revision
    if result.model.source == "hub" and "/" in name:
        return f"{name}@{revision}"
    if result.model.source in ("folder", "gguf"):
        notes.append(f"model: a {result.model.source} of your own, {revision}; put its path there")
        return f"./{name}" + (".gguf" if result.model.source == "gguf" else "")
    return name


def _text_name(resolved: str, origin: str, notes: list[str]) -> str:
    """Return the name under which a text can be asked for again.

    Args:
        resolved: What the spec calls it: a protocol, or data set and split.
        origin: Where it came from, as the spec says.
        notes: Takes what the reader has to do.
    """
    for name, entry in texts().items():
        if origin == entry.url or (entry.sha256 and origin.startswith("sha256:") and (
            resolved.partition("/")[0] in (name, f"{name}-raw")
        )):  # fmt: skip
            return name
        if entry.file and re.fullmatch(rf"wheel:[^/]+/{re.escape(entry.file)}", origin):
            return f"{name}@wheel"
        if entry.hub and origin.startswith(f"hub:{entry.hub}@"):
            return f"{name}@hub"
    digest = origin.removeprefix("sha256:")[:12]
    kind, ending = ("tokens", "safetensors") if resolved.startswith("tokens") else ("file", "txt")
    notes.append(f"{kind}:{digest}.{ending}: a file of your own, {origin}; put its path there")
    return f"{kind}:{digest}.{ending}"


def _toml(values: dict[str, Any]) -> list[str]:
    return [f"{key} = {_toml_value(value)}" for key, value in values.items()]


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'  # TOML has no null; options are read from this word
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
