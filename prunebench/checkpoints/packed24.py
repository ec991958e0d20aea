"""Folders with packed 2:4 matrices: writing one, and reading one as if it were dense.

    packed24-00001-of-00002.safetensors   NAME.values24 and NAME.codes24 of every packed matrix,
                                          and the other tensors as they are
    packed24.json                         every tensor that the folder must hold
    config.json, tokenizer, ...           as they were

The files have no name that transformers looks for: it refuses the folder, where it would otherwise
fill the matrices that it misses with random numbers.
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
from torch import Tensor

from prunebench.checkpoints.bitmask import bitmask_tensors, is_bitmask, plain_config
from prunebench.checkpoints.derived import Derived, read_tensor
from prunebench.checkpoints.fp8 import fp8_tensors, is_fp8, plain_fp8_config
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
from prunebench.models.stored_config import require_unquantised, stored_config
from prunebench.progress import Progress
from prunebench.sparse24.packed import (
    DTYPES,
    Packed24,
    check_24,
    pack24,
    require_24,
    require_sound,
    unpack24,
)

_VALUES, _CODES = ".values24", ".codes24"
_SHARD_BYTES = 2 << 30
_SIXTEEN_BITS = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)

Kind = Literal["dense", "packed24", "sparse-24-bitmask", "fp8"]


@dataclass(frozen=True)
class Packing:
    """What packing a folder did.

    Attributes:
        packed: The matrices that are packed now.
        dense: Matrices of two dimensions that are not, with the reason.
        packed_bytes: Of all tensors now.
        dense_bytes: Of all tensors when all are dense.
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
        IncompatibleData: A file is damaged, or a packed folder misses tensors or has others.
    """
    check_weight_files(folder)
    stored = stored_tensors(weight_files(folder))
    kind = kind_of(folder)
    if kind == "packed24":
        return _packed_tensors(folder, stored)
    if kind == "fp8":
        return fp8_tensors(folder, stored)
    return bitmask_tensors(folder, stored) if kind == "sparse-24-bitmask" else stored


def unpacked(local: LocalModel, progress: Progress) -> LocalModel:
    """Return a model whose weights are dense: itself, or its copy in the cache, made once.

    Raises:
        IncompatibleData: It is quantised in a way that is not read.
    """
    kind = kind_of(local.path)
    if kind == "dense":
        require_unquantised(local.path)
        return local
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
    """Read a folder that was just written: it must be the same model.

    Packing forgets the sign of zeros and of NaN, and nothing else.

    Args:
        source: What it was made from.
        tensors: The tensors of that, from `dense_tensors`.
        folder: Where it is now.
        name: Where it is going to be.
        progress: Hears of the stage.

    Raises:
        SaveError: It holds anything else, or cannot be read.
    """
    what, where = f"{name} was not saved: it is not what it was made from", ""
    config = dense_config(source) or stored_config(source)
    with progress.stage("verify", total=len(tensors), detail=str(name), unit="tensors") as tell:
        try:
            written = dense_tensors(folder)
            for key in sorted({*tensors, *written}):
                if key not in written or key not in tensors:
                    where = f"{key} is missing" if key in tensors else f"{key} is new"
                elif not _equal(written[key], tensors[key]):
                    where = f"{key} has changed"
                if where:
                    break
                tell(1)
            if other_files(folder) or stored_config(folder) != config:
                where = where or "config.json has changed, or a file is beside the weights"
        except Exception as error:  # whatever a reader would stumble over
            where = error.what if isinstance(error, PrunebenchError) else str(error)
    if where:
        raise SaveError(what, where=where, fix="check the disk and try again")


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = read_tensor(one), read_tensor(other)
    if torch.equal(first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8)):
        return True
    if not first.is_floating_point() or first.itemsize == 1:
        return False
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


# ---------------------------------------------------------------- writing


def write_dense(tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    """Write tensors as transformers reads them, in shards."""
    pieces = ((name, read_tensor(one)) for name, one in tensors.items())
    files = _write_shards(pieces, folder, "model")
    if len(set(files.values())) > 1:
        total = sum(one.stop - one.start for one in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_packed(
    tensors: Mapping[str, StoredTensor], folder: Path, *, progress: Progress
) -> Packing:
    """Pack every matrix that is 2:4, and write all tensors.

    Raises:
        IncompatibleData: No matrix is 2:4 (the first group that breaks it is named), or the
            2:4 matrices are in float32.
    """
    rows: dict[str, Any] = {}
    work = _Packer(rows)
    with progress.stage("pack", total=len(tensors), detail="2:4 matrices", unit="tensors") as tell:

        def told() -> Iterator[tuple[str, Tensor]]:
            for one in tensors.values():
                yield from work.pack(one)
                tell(1)

        _write_shards(told(), folder, "packed24")
    if not work.packed:
        raise work.nothing_packed()
    index = {"format": "packed24", "version": 1, "tensors": rows}
    (folder / PACKED_INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    total = sum(one.stop - one.start for one in tensors.values())
    return Packing(tuple(work.packed), work.dense, work.bytes, total, work.negative_zeros)


class _Packer:
    """Packs tensor after tensor, and remembers what it did; `rows` becomes the index."""

    def __init__(self, rows: dict[str, Any]) -> None:
        self.rows = rows
        self.packed: list[str] = []
        self.dense: dict[str, str] = {}
        self.bytes = self.negative_zeros = 0
        self._first: IncompatibleData | None = None

    def pack(self, stored: StoredTensor) -> Iterator[tuple[str, Tensor]]:
        tensor = read_tensor(stored)
        found = self._try(stored, tensor)
        row = {"shape": list(stored.shape), "dtype": stored.dtype}
        if found is None:
            self.rows[stored.name] = row | {"stored": "dense"}
            self.bytes += tensor.nbytes
            yield stored.name, tensor
            return
        packed, across = found
        self.rows[stored.name] = row | {"stored": "packed24", "transposed": across}
        self.packed.append(stored.name)
        self.bytes += packed.bytes
        yield stored.name + _VALUES, packed.values
        yield stored.name + _CODES, packed.codes

    def _try(self, stored: StoredTensor, tensor: Tensor) -> tuple[Packed24, bool] | None:
        """Return the packed matrix, and whether its groups lie across (GPT-2 stores [in, out])."""
        if tensor.ndim != 2 or not tensor.dtype.is_floating_point:
            return None
        for across in (False, True):
            matrix = tensor.T.contiguous() if across else tensor
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
                self._remember(stored.name, report, matrix)
        self.dense.setdefault(stored.name, f"no side of {list(stored.shape)} is a multiple of 4")
        return None

    def _remember(self, name: str, report: Any, matrix: Tensor) -> None:
        if self._first is None and "embed" not in name and "head" not in name:
            try:
                require_24(report, matrix, name=name)
            except IncompatibleData as error:
                self._first = error

    def nothing_packed(self) -> IncompatibleData:
        """Say why there is nothing to pack."""
        return self._first or IncompatibleData("no tensor is a matrix: there is nothing to pack")


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, stem: str) -> dict[str, str]:
    """Write tensors into as many files as they need; returns the file of each."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(waiting, folder / f"{stem}-{len(shards) + 1}.part", {"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and sum(one.nbytes for one in waiting.values()) + tensor.nbytes > _SHARD_BYTES:
            flush()
        waiting[name] = tensor.contiguous()
    flush()
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        final = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        final = f"{stem}.safetensors" if len(shards) == 1 else final
        (folder / f"{stem}-{number}.part").rename(folder / final)
        files |= dict.fromkeys(names, final)
    return files


def dense_config(folder: Path) -> dict[str, Any] | None:
    """Return the config for the dense weights of a folder; None if it is the one that it has."""
    return plain_fp8_config(folder) if is_fp8(folder) else plain_config(folder)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights; a config without what describes how they are stored."""
    for path in sorted(source.iterdir()):
        weights = path.suffix == ".safetensors" or path.name in (INDEX_NAME, PACKED_INDEX)
        if path.is_file() and not weights and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    copy_templates(source, target)
    config = dense_config(source)
    if config is not None:
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- reading


def _packed_tensors(folder: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    rows = _read_index(folder)
    wanted: set[str] = set()
    for name, row in rows.items():
        is_packed = row["stored"] == "packed24"
        wanted |= {name + _VALUES, name + _CODES} if is_packed else {name}
    for names, what in (
        (sorted(wanted - stored.keys()), "misses"),
        (sorted(stored.keys() - wanted), "has more than its index:"),
    ):
        if names:
            raise IncompatibleData(
                f"{folder} {what} {len(names)} tensors, the first is {names[0]}",
                where=f"{PACKED_INDEX} names {len(wanted)} tensors, the files hold {len(stored)}",
                fix="copy or download the folder again, or export the checkpoint again",
            )
    return {name: _from_index(name, row, stored) for name, row in rows.items()}


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / PACKED_INDEX
    try:
        document = json.loads(path.read_text("utf-8"))
        rows: dict[str, dict[str, Any]] = document["tensors"]
        sound = document["format"] == "packed24" and document["version"] == 1
        sound = sound and all(row["stored"] in ("dense", "packed24") for row in rows.values())
        sound = sound and all(len(row["shape"]) >= 0 for row in rows.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompatibleData(
            f"{path} is damaged", where=f"{type(error).__name__}: {error}", fix="export again"
        ) from None
    if not sound:
        raise IncompatibleData(
            f"{path} is no index of packed24, version 1", fix="update prunebench, or export again"
        )
    return rows


def _from_index(name: str, row: dict[str, Any], stored: dict[str, StoredTensor]) -> StoredTensor:
    shape, dtype = tuple(row["shape"]), str(row["dtype"])
    if row["stored"] == "dense":
        one = stored[name]
        if (one.shape, one.dtype) != (shape, dtype):
            raise _unlike(one, shape, dtype)
        return one
    values, codes = stored[name + _VALUES], stored[name + _CODES]
    across = bool(row.get("transposed"))
    out, width = (shape[1], shape[0]) if across else shape
    if (values.shape, values.dtype) != ((out, width // 2), dtype):
        raise _unlike(values, (out, width // 2), dtype)
    if (codes.shape, codes.dtype) != ((out, (width + 7) // 8), "uint8"):
        raise _unlike(codes, (out, (width + 7) // 8), "uint8")

    def make() -> Tensor:
        packed = Packed24(read_tensor(values), read_tensor(codes))
        require_sound(packed, name=name)
        dense = unpack24(packed)
        return dense.T.contiguous() if across else dense

    return Derived.of(values, name=name, dtype=dtype, shape=shape, make=make)


def _unlike(one: StoredTensor, shape: tuple[int, ...], dtype: str) -> IncompatibleData:
    return IncompatibleData(
        f"{one.name} is {one.dtype} {list(one.shape)}, {PACKED_INDEX} says {dtype} {list(shape)}",
        where=f"in {one.path}",
        fix="copy or download the folder again, or export the checkpoint again",
    )
