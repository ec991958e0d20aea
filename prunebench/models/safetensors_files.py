"""Read safetensors files in pieces: which files a folder has, their headers, checks and hashes.

The format is an 8-byte little-endian header length, a JSON header, and the tensors' bytes
(https://github.com/huggingface/safetensors#format); a file whose size differs from what its header
says was cut off or damaged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunebench.errors import IncompatibleData

# About the limit of the library. A damaged length would otherwise be allocated.
_HEADER_LIMIT_BYTES = 100 << 20
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PACKED_INDEX = "packed24.json"
PACKED_NOTICE = "this model is packed: pip install prunebench, and import prunebench first"
"""`transformers_weights` in the config of a packed folder: where nothing reads the packed form,
transformers refuses this as the name of a file, and prints it."""
ADAPTER_CONFIG = "adapter_config.json"
_PIECE_BYTES = 16 << 20
_DTYPES = {  # name in the format: name in torch, bytes per element
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "I16": ("int16", 2),
    "U16": ("uint16", 2), "I32": ("int32", 4), "U32": ("uint32", 4), "I64": ("int64", 8),
    "U64": ("uint64", 8), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4),
    "F64": ("float64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
DTYPE_CODES = {name: code for code, (name, _) in _DTYPES.items()}
"""Name in the format for a dtype of torch."""


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor in a file.

    Attributes:
        path: The file.
        name: In the file.
        dtype: Name in torch, e.g. `bfloat16`; the format's name if torch has no such dtype.
        shape: As stored, row-major.
        start: Offset of its first byte in the file.
        stop: Offset after its last byte.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def pieces(self, *, align: int = 1) -> Iterator[bytearray]:
        """Yield its bytes in pieces of about 16 MB, each a multiple of `align` bytes.

        The bytes are row-major and little endian, as the format stores them.

        Raises:
            IncompatibleData: The file has become shorter.
        """
        step = max(1, _PIECE_BYTES // align) * align
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            for at in range(self.start, self.stop, step):
                # A bytearray is writable; of read-only bytes, torch.frombuffer warns.
                piece = bytearray(min(step, self.stop - at))
                if stream.readinto(piece) != len(piece):  # truncated after its header was read
                    raise _damaged(self.path, f"{self.name} ends early")
                yield piece


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a model's folder, sorted; empty if there are none.

    Everything that reads, hashes or copies a folder uses this rule: `model.safetensors`, or the
    files of `model.safetensors.index.json`, or those of `packed24.json`. Any other safetensors file
    in the folder is not part of the model, see `other_files`.

    Raises:
        IncompatibleData: The folder has two of these, or something else that other programs would
            read as the model or as part of it.
    """
    layouts = {name: files for name, files in _layouts(folder) if files}
    # An index that names only model.safetensors is the same layout twice.
    if len({tuple(files) for files in layouts.values()}) > 1:
        raise IncompatibleData(
            f"{folder} holds the weights twice",
            where=f"as {' and as '.join(layouts)}; programs differ in which they read",
            fix="move those that are not meant to another folder",
        )
    _require_no_more(folder)
    return next(iter(layouts.values()), [])


def other_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that are not part of its model, sorted."""
    return sorted(set(folder.glob("*.safetensors")) - set(weight_files(folder)))


def _layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """Yield each way in which a folder holds weights: the deciding file, and the weight files."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if index.is_file():
        try:
            names = {
                str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()
            }
        except (ValueError, KeyError, AttributeError) as error:
            raise _damaged(index, f"not a weight index: {error}") from None
        outside = sorted(name for name in names if Path(name).name != name)
        if outside:  # an index could name any file of the machine
            raise _damaged(index, f"it names {outside[0]}, which is not in the folder")
        yield INDEX_NAME, [folder / name for name in sorted(names)]
    if single.is_file():
        yield SINGLE_NAME, [single]
    if (folder / PACKED_INDEX).is_file():
        yield PACKED_INDEX, sorted(folder.glob("packed24*.safetensors"))


def _require_no_more(folder: Path) -> None:
    """Refuse other files that change which weights a program reads, such as an adapter."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise IncompatibleData(
            f"{folder} holds an adapter ({ADAPTER_CONFIG})",
            where="whether the weights hold it already cannot be told, and peft would add it",
            fix="merge it into its base model, or move the adapter's files to another folder",
        )
    shards = sorted(folder.glob("shard-*-model-*-of-*.safetensors"))
    if shards:
        raise IncompatibleData(
            f"{folder} holds a distributed checkpoint",
            where=f"{shards[0].name} and its siblings are pieces of tensors",
            fix="save it with save_pretrained from one process",
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return  # load_config raises for it
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    if named is not None and not (named == PACKED_NOTICE and (folder / PACKED_INDEX).is_file()):
        raise IncompatibleData(
            f"{folder} names its weights in config.json (transformers_weights)",
            where=f"{named}; other programs read {SINGLE_NAME} or {INDEX_NAME}",
            fix=f"rename the file to {SINGLE_NAME}, and remove transformers_weights",
        )


def read_header(path: Path) -> dict[str, dict[str, object]]:
    """Return the header of a safetensors file: tensor name to dtype, shape and data offsets.

    Raises:
        IncompatibleData: The file is damaged or truncated; the reason is given.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        # Layout: 8 bytes header length, JSON header, then the tensors, offsets counted from there.
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
            raise _damaged(path, f"its header does not fit its {size:,} bytes")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((int(row["data_offsets"][1]) for row in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"its header is not readable: {error}") from None
    # The one check of the data that costs no reading: a download that was cut off is shorter.
    if size != 8 + length + end:
        raise _damaged(path, f"its header promises {8 + length + end:,} bytes, it has {size:,}")
    return dict(header)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by name, in the files' order; only headers are read.

    Raises:
        IncompatibleData: A file is damaged, a tensor's bytes do not fit its shape, or two files
            hold the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        header = read_header(path)
        with path.open("rb") as stream:
            data_start = 8 + int.from_bytes(stream.read(8), "little")
        for name, row in header.items():
            try:
                start, stop = (data_start + int(offset) for offset in row["data_offsets"])  # type: ignore[attr-defined]
                shape = tuple(map(int, row["shape"]))  # type: ignore[call-overload]
                code = str(row["dtype"])
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(path, f"the header of {name} is not readable: {error}") from None
            # A dtype that torch does not have keeps its code; the size of its elements is unknown.
            dtype, width = _DTYPES.get(code, (code, None))
            if (
                width is not None
                and not data_start <= start <= stop == start + math.prod(shape) * width
            ):
                raise _damaged(path, f"the bytes of {name} do not fit {code} {list(shape)}")
            if name in tensors:
                raise _damaged(path, f"{name} is in {tensors[name].path.name} too")
            tensors[name] = StoredTensor(path, name, dtype, shape, start, stop)
    return tensors


def hash_stored(
    tensors: Mapping[str, StoredTensor],
    names: Iterable[str],
    *,
    advance: Callable[[int], None] | None = None,
) -> str:
    """Return the hash of stored parameters, reading a piece at a time.

    The same SHA-256 as `models.hashing.hash_weights` of the loaded model: over name, dtype, shape
    and bytes of every parameter, sorted by name.

    Args:
        tensors: From `stored_tensors`.
        names: Of the model's parameters (`named_parameters` lists tied ones once).
        advance: Called with the number of bytes after each piece.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = tensors[name]
        # `torch.`: as a dtype prints itself, which is what `hash_weights` hashes.
        digest.update(f"{name}\0torch.{tensor.dtype}\0{tensor.shape}\0".encode())
        for piece in tensor.pieces():
            digest.update(piece)
            if advance:
                advance(len(piece))
    return digest.hexdigest()


def check_weight_files(folder: Path) -> None:
    """Raise `IncompatibleData` if a weight file is missing, truncated or damaged."""
    files = weight_files(folder)
    if not files:
        others = other_files(folder)
        raise IncompatibleData(
            f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}"
            if others
            else f"{folder} holds no safetensors",
            where=f"{others[0].name} is neither"
            if others
            else "pickled weights (.bin, .pt) are never read",
            fix="save the model with save_pretrained, which writes safetensors",
        )
    for path in files:
        if not path.is_file():
            raise _damaged(path, f"{INDEX_NAME} names it, and it is not there")
        read_header(path)


def _damaged(path: Path, reason: str) -> IncompatibleData:
    return IncompatibleData(
        f"{path} is damaged", where=reason, fix="copy or download the file again"
    )
