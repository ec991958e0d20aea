"""Read the keep masks of a model one parameter at a time, from a mask file or a checkpoint.

A mask file is what `run --save-masks` writes and the format of the published MaskLLM masks: one
entry per parameter, `<parameter name>.mask`, `numpy.packbits` of the keep mask in the layout of the
parameter. The mask of a checkpoint is where its weights are not zero.
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from prunebench.download.hub_files import fetch_file
from prunebench.errors import IncompatibleData, MissingResource, UsageError
from prunebench.files import sha256_file
from prunebench.models.linears import Linear
from prunebench.models.safetensors_files import StoredTensor, weight_files
from prunebench.models.stored_model import whole_tensor
from prunebench.progress import Progress

HUB_FILE = "mask_compressed.npz"
"""Name of the mask file in a hub repository, as in the published ones."""

_DAMAGE = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for a damaged file."""


@dataclass(frozen=True)
class Masks:
    """Masks that fit a model.

    Attributes:
        origin: `hub:REPO@COMMIT`, or `sha256:` and the hash of the file or files.
        read_parameter: Returns the keep mask of a parameter by its name: bool, its shape.
    """

    origin: str
    read_parameter: Callable[[str], Bool[Tensor, "..."]]

    def read(self, linear: Linear) -> Bool[Tensor, "out in"]:
        """Return the keep mask of one matrix."""
        keep = self.read_parameter(linear.parameter_name)
        keep = keep if linear.expert is None else keep[linear.expert]  # [experts, ...] -> [...]
        return keep.T.contiguous() if linear.transposed else keep  # [out, in]


def open_masks(
    name: str, linears: Sequence[Linear], progress: Progress,
    tensors_of: Callable[[Path], Mapping[str, StoredTensor]],
) -> Masks:  # fmt: skip
    """Find masks by name and check that they fit the model; they are read later, one at a time.

    Args:
        name: `hub:REPO` or `hub:REPO@REVISION`, a mask file (.npz), or the folder of a checkpoint.
        linears: The prunable matrices of the model; they may be on the meta device.
        progress: Shows a download.
        tensors_of: Returns the tensors of a folder, dense, by their names in the model.

    Raises:
        MissingResource: They do not exist, or the hub cannot be reached.
        IncompatibleData: They are damaged, hold pickled objects, or belong to another model.
    """
    shapes = {linear.parameter_name: tuple(_parameter(linear).shape) for linear in linears}
    origin = masks_origin(name, progress)
    if name.startswith("hub:"):
        path, _ = _from_hub(name.removeprefix("hub:"), progress)
        return Masks(origin, mask_file(path, shapes))
    path = Path(name).expanduser()
    if path.is_dir():
        return Masks(origin, _checkpoint(path, tensors_of(path), shapes))
    return Masks(origin, mask_file(path, shapes))


def masks_origin(name: str, progress: Progress) -> str:
    """Return where masks come from: `hub:REPO@COMMIT`, or a hash of the file or files.

    Raises:
        MissingResource: They do not exist, or the hub cannot be reached.
    """
    if name.startswith("hub:"):
        return _from_hub(name.removeprefix("hub:"), progress)[1]
    path = Path(name).expanduser()
    if path.is_dir():
        digests = "".join(map(sha256_file, sorted(weight_files(path))))
        return f"sha256:{hashlib.sha256(digests.encode()).hexdigest()}"
    require_masks_named(name)
    return f"sha256:{sha256_file(path)}"


def require_masks_named(name: str) -> None:
    """Refuse a name that cannot be one of masks, before anything is downloaded.

    Raises:
        MissingResource: There is no such file or folder.
        UsageError: It is neither a mask file nor a folder.
    """
    path = Path(name).expanduser()
    if name.startswith("hub:") or path.is_dir():
        return
    if not path.is_file():
        raise MissingResource(f"there are no masks at {name}", fix="check the path")
    if path.suffix != ".npz":
        raise UsageError(
            f"{name} is not a mask file",
            where="masks are a .npz file, a checkpoint's folder, or hub:REPO",
            fix="make one with prunebench run --save-masks masks.npz",
        )


def _parameter(linear: Linear) -> Tensor:
    parameter: Tensor = getattr(linear.module, linear.attribute)
    return parameter


def _from_hub(repository: str, progress: Progress) -> tuple[Path, str]:
    name, _, revision = repository.partition("@")
    path = fetch_file(
        name,
        HUB_FILE,
        revision=revision or None,
        progress=progress,
        fix="download the file elsewhere, and name it: --set masks=PATH.npz",
    )
    return path, f"hub:{name}@{path.parent.name}"  # snapshots/<commit>/<file>


def mask_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    """Check that a mask file fits the parameters of a model; return a function that reads a mask.

    Args:
        path: The file.
        shapes: Shapes of the parameters, by name.

    Returns:
        From the name of a parameter to its keep mask, bool, of its shape.

    Raises:
        IncompatibleData: It is not a mask file, holds pickled objects, or does not fit the shapes.
    """
    try:
        # Lazy: an entry is decompressed whenever it is read. A pickled one could run code.
        stored = np.load(path, allow_pickle=False)
        entries = set(stored.files)
    # AttributeError: a plain .npy array has no `files`.
    except (*_DAMAGE, AttributeError) as error:
        raise IncompatibleData(
            f"{path} is not a mask file",
            where=str(error),
            fix="make one with prunebench run --save-masks masks.npz",
        ) from None

    def packed(name: str) -> Any:
        size = int(np.prod(shapes[name]))
        try:
            bits = stored[f"{name}.mask"] if f"{name}.mask" in entries else None  # [ceil(size / 8)]
        except _DAMAGE as error:  # pickled, cut short, or with wrong bits
            raise IncompatibleData(
                f"{path} is damaged", where=f"{name}: {error}", fix="copy or make it again"
            ) from None
        if bits is None or bits.dtype != np.uint8 or bits.size != (size + 7) // 8:
            entry = "nothing" if bits is None else f"{bits.size} bytes of {bits.dtype}"
            raise IncompatibleData(
                f"{path} does not fit the model",
                where=f"{name} needs {size} bits, the file holds {entry}",
                fix="use the masks of this very model",
            )
        return bits

    for name in shapes:  # every entry is checked before the run starts; none stays in memory
        packed(name)

    def read(name: str) -> Tensor:
        shape = shapes[name]
        bits = np.unpackbits(packed(name), count=int(np.prod(shape)))  # [size], without padding
        return torch.from_numpy(bits.astype(bool)).view(shape)

    return read


def _checkpoint(
    folder: Path, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[str], Tensor]:
    """Do what `mask_file` does, for the tensors of a checkpoint's folder."""

    def misfit(where: str) -> IncompatibleData:
        fix = "use a checkpoint of this very model"
        return IncompatibleData(f"{folder} does not fit the model", where=where, fix=fix)

    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            raise misfit(f"it holds no {name} of shape {shape}")

    # The experts of a block, read one after the other, share two parameters.
    @functools.lru_cache(maxsize=2)
    def read(name: str) -> Tensor:
        try:
            # -0.0 != 0 is False, so a negative zero is pruned too.
            return whole_tensor(tensors[name]) != 0
        except (RuntimeError, ValueError) as error:  # such as another number of experts
            raise misfit(f"{name} cannot be made from its parts: {error}") from None

    return read
