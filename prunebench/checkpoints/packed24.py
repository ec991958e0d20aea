"""Write folders with packed 2:4 matrices, and read every storage format as if it were dense.

    packed24-00001-of-00002.safetensors   NAME.values24 and NAME.codes24 of each packed matrix,
                                          and the other tensors unchanged
    packed24.json, config.json, ...       see `checkpoints.packed24_index`
    tokenizer, ...                        unchanged

transformers looks for other file names and so refuses the folder where prunebench is not imported;
otherwise it would initialize the packed matrices, which it does not find, with random numbers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunebench.checkpoints.bitmask import bitmask_tensors, is_bitmask, plain_config
from prunebench.checkpoints.derived import read_tensor
from prunebench.checkpoints.fp8 import fp8_tensors, is_fp8, plain_fp8_config
from prunebench.checkpoints.packed24_index import (
    CODES,
    SHARDS_INDEX,
    VALUES,
    has_settings,
    write_rows,
    write_settings,
)
from prunebench.checkpoints.packed24_index import plain_config as plain_packed_config
from prunebench.checkpoints.read_packed24 import packed24_tensors
from prunebench.errors import IncompatibleData, PrunebenchError, SaveError
from prunebench.files import atomic_folder, cache_dir
from prunebench.models.carried import copy_templates
from prunebench.models.safetensors_files import (
    INDEX_NAME,
    PACKED_INDEX,
    StoredTensor,
    check_weight_files,
    other_files,
    stored_tensors,
    weight_files,
)
from prunebench.models.source import LocalModel
from prunebench.models.stored_config import require_unquantized, store_config, stored_config
from prunebench.models.stored_model import stored_model
from prunebench.progress import Progress
from prunebench.sparse24.packed import (
    DTYPES,
    Packed24,
    check_24,
    pack24,
    require_24,
)

INDEXES = (INDEX_NAME, PACKED_INDEX, SHARDS_INDEX)
"""Files of a folder that name its weights; they are written with the weights."""
_SHARD_BYTES = 2 << 30
_SIXTEEN_BITS = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)

Kind = Literal["dense", "packed24", "sparse-24-bitmask", "fp8"]


@dataclass(frozen=True)
class Packing:
    """Report of packing a folder.

    Attributes:
        packed: Names of the packed matrices.
        dense: Reason why each other matrix was not packed, by name.
        packed_bytes: Size of all tensors as written.
        dense_bytes: Size of all tensors if all were dense.
        negative_zeros: Elements -0.0 that became +0.0.
    """

    packed: tuple[str, ...]
    dense: dict[str, str]
    packed_bytes: int
    dense_bytes: int
    negative_zeros: int


def kind_of(folder: Path) -> Kind:
    """Return how the weights of a folder are stored."""
    if (folder / PACKED_INDEX).is_file():
        return "packed24"
    if is_bitmask(folder):
        return "sparse-24-bitmask"
    return "fp8" if is_fp8(folder) else "dense"


def dense_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder by name, packed ones as if they were dense.

    Raises:
        IncompatibleData: A file is damaged, or a packed folder does not match its index.
    """
    check_weight_files(folder)
    stored = stored_tensors(weight_files(folder))
    kind = kind_of(folder)
    if kind == "packed24":
        return packed24_tensors(folder, stored)
    if kind == "fp8":
        return fp8_tensors(folder, stored)
    return bitmask_tensors(folder, stored) if kind == "sparse-24-bitmask" else stored


def model_tensors(model: nn.Module, folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder by their names in the model, packed ones as if dense.

    Raises:
        IncompatibleData: A file is damaged, or a packed folder does not match its index.
    """
    return stored_model(model, dense_tensors(folder)).tensors


def unpacked(local: LocalModel, progress: Progress) -> LocalModel:
    """Return a model with dense weights: itself, or its dense copy in the cache, made once.

    Raises:
        IncompatibleData: It is quantized in a format that is not supported.
    """
    kind = kind_of(local.path)
    if kind == "dense":
        require_unquantized(local.path)
        return local
    # The revision is part of the name: another version of the model is another copy.
    digest = hashlib.sha256(local.revision.encode()).hexdigest()[:12]
    path = cache_dir() / "models" / f"{local.source.id.replace('/', '--')}-dense-{digest}"
    if not path.is_dir():
        detail = f"{kind} to dense safetensors, once"
        with progress.stage("unpack", detail=detail), atomic_folder(path) as part:
            tensors = dense_tensors(local.path)
            copy_companions(local.path, part)
            write_dense(tensors, part)
            require_same(local.path, tensors, part, name=path, progress=progress)
    return replace(local, path=path)


def require_same(
    source: Path,
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    *,
    name: Path,
    progress: Progress,
) -> None:
    """Read a folder that was just converted, and check that it holds the same model.

    Packing loses the sign of zeros and of NaN, and nothing else.

    Args:
        source: The folder that it was converted from.
        tensors: The tensors of that folder, from `dense_tensors`.
        folder: Its temporary name.
        name: Its final name, for messages.
        progress: Shows the stage.

    Raises:
        SaveError: It holds another model, or cannot be read.
    """
    what, where = f"{name} was not saved: it is not what it was made from", ""
    config = dense_config(source) or stored_config(source)
    with progress.stage("verify", total=len(tensors), detail=str(name), unit="tensors") as advance:
        try:
            written = dense_tensors(folder)
            for key in sorted({*tensors, *written}):
                if key not in written or key not in tensors:
                    where = f"{key} is missing" if key in tensors else f"{key} is new"
                elif not _equal(written[key], tensors[key]):
                    where = f"{key} has changed"
                if where:
                    break
                advance(1)
            now = dense_config(folder) if has_settings(folder) else stored_config(folder)
            if other_files(folder) or now != config:
                where = where or "config.json has changed, or a file is beside the weights"
        except Exception as error:  # anything that a reader could raise
            where = error.what if isinstance(error, PrunebenchError) else str(error)
    if where:
        raise SaveError(what, where=where, fix="check the disk and try again")


def _equal(left: StoredTensor, right: StoredTensor) -> bool:
    """Return whether two tensors are equal but for the sign of zeros and of NaN."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    a, b = read_tensor(left), read_tensor(right)
    # Bytes first: it is the usual case, works for every dtype, and finds equal NaN equal.
    if torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)):
        return True
    if not a.is_floating_point() or a.itemsize == 1:  # float8 is never packed
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---------------------------------------------------------------- writing


def write_dense(tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    """Write tensors as plain safetensors, in shards with an index if they need more than one."""
    # A generator: only the tensors of one shard are in memory at a time.
    dense = ((name, read_tensor(tensor)) for name, tensor in tensors.items())
    files = _write_shards(dense, folder, "model")
    if len(set(files.values())) > 1:
        total = sum(tensor.stop - tensor.start for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_packed(
    tensors: Mapping[str, StoredTensor], folder: Path, *, progress: Progress
) -> Packing:
    """Pack every matrix that is 2:4; write all tensors, the indexes, and the format in the config.

    Args:
        tensors: From `dense_tensors`.
        folder: The folder to write to; it holds the dense model's config.
        progress: Shows the stage.

    Raises:
        IncompatibleData: No matrix is 2:4 (the error names the first group that breaks it), or the
            2:4 matrices are in float32.
    """
    packer = _Packer()
    with progress.stage(
        "pack", total=len(tensors), detail="2:4 matrices", unit="tensors"
    ) as advance:

        def packed() -> Iterator[tuple[str, Tensor]]:
            for tensor in tensors.values():
                yield from packer.pack(tensor)
                advance(1)

        _write_shards(packed(), folder, "packed24")
    if not packer.packed:
        raise packer.nothing_packed()
    write_rows(folder, packer.rows)
    write_settings(folder)
    return Packing(
        packed=tuple(packer.packed),
        dense=packer.dense,
        packed_bytes=packer.bytes,
        dense_bytes=sum(tensor.stop - tensor.start for tensor in tensors.values()),
        negative_zeros=packer.negative_zeros,
    )


class _Packer:
    """Packs one tensor at a time, and collects the index (`rows`) and the numbers of `Packing`."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}
        self.packed: list[str] = []
        self.dense: dict[str, str] = {}
        self.bytes = self.negative_zeros = 0
        self._first: IncompatibleData | None = None

    def pack(self, stored: StoredTensor) -> Iterator[tuple[str, Tensor]]:
        """Yield what to write for a tensor: its values and codes, or itself if it is not 2:4."""
        tensor = read_tensor(stored)
        result = self._try(stored, tensor)
        row = {"shape": list(stored.shape), "dtype": stored.dtype}
        if result is None:
            self.rows[stored.name] = row | {"stored": "dense"}
            self.bytes += tensor.nbytes
            yield stored.name, tensor
            return
        packed, across = result
        self.rows[stored.name] = row | {"stored": "packed24", "transposed": across}
        self.packed.append(stored.name)
        self.bytes += packed.bytes
        yield stored.name + VALUES, packed.values
        yield stored.name + CODES, packed.codes

    def _try(self, stored: StoredTensor, tensor: Tensor) -> tuple[Packed24, bool] | None:
        """Return the packed matrix, and whether it was transposed (GPT-2 stores [in, out])."""
        if tensor.ndim != 2 or not tensor.dtype.is_floating_point:
            return None
        for across in (False, True):  # as stored [out, in] first, then transposed
            matrix = tensor.T.contiguous() if across else tensor  # [out, in]
            if matrix.shape[1] % 4:
                continue
            report = check_24(matrix, name=stored.name)
            if report.holds:
                if stored.dtype not in _SIXTEEN_BITS:
                    raise IncompatibleData(
                        f"{stored.name} is {stored.dtype}, and 2:4 is packed in 16 bits",
                        where=f"in {stored.path}",
                        fix="run it again with --dtype bfloat16 and --save-model",
                    )
                self.negative_zeros += report.negative_zeros
                return pack24(matrix, name=stored.name), across
            if not across:
                self.dense[stored.name] = f"{report.over:,} of {report.groups:,} groups break it"
                self._note_violation(stored.name, report, matrix)
        self.dense.setdefault(stored.name, f"no side of {list(stored.shape)} is a multiple of 4")
        return None

    def _note_violation(self, name: str, report: Any, matrix: Tensor) -> None:
        """Store the error of the first layer that is not 2:4; embedding and head never are."""
        if self._first is None and "embed" not in name and "head" not in name:
            try:
                require_24(report, matrix, name=name)
            except IncompatibleData as error:
                self._first = error

    def nothing_packed(self) -> IncompatibleData:
        """Return the error if no matrix was packed."""
        return self._first or IncompatibleData("no tensor is a matrix: there is nothing to pack")


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, stem: str) -> dict[str, str]:
    """Write tensors to shards of up to 2 GiB; return the name of the file of each."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}

    def flush() -> None:
        # safetensors needs contiguous tensors; the final name needs the number of shards
        save_file(batch, folder / f"{stem}-{len(shards) + 1}.part", {"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        # A tensor larger than a shard gets one of its own.
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > _SHARD_BYTES:
            flush()
        batch[name] = tensor.contiguous()
    flush()
    files: dict[str, str] = {}  # names hold the number of shards, so they are renamed at the end
    for number, names in enumerate(shards, 1):
        final = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        final = f"{stem}.safetensors" if len(shards) == 1 else final
        (folder / f"{stem}-{number}.part").rename(folder / final)
        files |= dict.fromkeys(names, final)
    return files


def dense_config(folder: Path) -> dict[str, Any] | None:
    """Return the config for the dense weights of a folder; None if its own config fits."""
    if has_settings(folder):
        return plain_packed_config(stored_config(folder))
    return plain_fp8_config(folder) if is_fp8(folder) else plain_config(folder)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the other files of a folder; the config loses its compression settings."""
    for path in sorted(source.iterdir()):
        weights = path.suffix == ".safetensors" or path.name in INDEXES
        if path.is_file() and not weights and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    copy_templates(source, target)
    config = dense_config(source)
    if config is not None:
        store_config(target, config)
