"""Carry over the parts of a checkpoint that the text model does not use.

A vision tower, multi-token-prediction blocks, the files of an image processor: pruning does not
change them and the config still refers to them, so every saved folder has them too, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prunebench.errors import IncompatibleData
from prunebench.models.complete import is_harmless
from prunebench.models.safetensors_files import (
    DTYPE_CODES,
    INDEX_NAME,
    StoredTensor,
    stored_tensors,
    weight_files,
)
from prunebench.models.stored_config import store_config, stored_config
from prunebench.models.stored_model import StoredModel, saved_names, stored_model

TEMPLATES = "additional_chat_templates"
"""Folder in which transformers saves chat templates other than the first."""

_COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*.tiktoken", "normalizer.json", "chat_template*", "*.jinja",
    "generation_config.json", "*processor_config.json",
)  # fmt: skip


def carried_tensors(source: StoredModel) -> dict[str, StoredTensor]:
    """Return the tensors that the text model does not use, by name in the files."""
    return {
        key: tensor for key, tensor in source.unused.items() if not is_harmless(key, tensor.shape)
    }


def require_carriable(folder: Path, model: nn.Module) -> None:
    """Refuse, before pruning, a model that cannot be saved together with what it does not use.

    The saved folder mixes tensors that transformers saves with tensors that are carried over, so
    transformers must save under the names that the files have.

    Args:
        folder: The dense model.
        model: Built from its config, on any device.

    Raises:
        IncompatibleData: transformers would save under other names.
    """
    source = stored_model(model, stored_tensors(weight_files(folder)))
    carried = carried_tensors(source)
    others = sorted(saved_names(model, source) - source.names) if carried else []
    if others:
        raise IncompatibleData(
            f"{folder} cannot be saved with the {len(carried)} tensors that the text model does "
            "not use",
            where=f"transformers would write {others[0]}, which is not a name in its files; "
            f"what is not used begins with {min(carried)}",
            fix="use --weights disk, which keeps the names, or run without --save-model",
        )


# ---------------------------------------------------------------- writing


def write_stored(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Copy tensors of other files to a safetensors file, a piece at a time.

    Args:
        path: The file to write.
        tensors: By their names in the new file.

    Raises:
        IncompatibleData: A file has become shorter.
        OSError: The disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.stop - tensor.start
        header[name] = {
            # A dtype that torch does not have is stored by its code already.
            "dtype": DTYPE_CODES.get(tensor.dtype, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 8)  # tensors begin at a multiple of 8 bytes
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                stream.write(piece)


def add_carried(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Add tensors to the folder of a saved model, as one more shard, and write a new index.

    Raises:
        IncompatibleData: A file has become shorter.
        OSError: The disk is full.
    """
    if not tensors:
        return
    files = weight_files(folder)
    count = len(files) + 1
    (folder / INDEX_NAME).unlink(missing_ok=True)  # its file names have another count
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    # No new name is taken: the count in it is one more than in the old ones.
    for old, new in zip(files, names, strict=False):
        old.rename(folder / new)
    write_stored(folder / names[-1], tensors)
    write_index(folder, names)


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Write the index of a model in several files of a folder."""
    rows = stored_tensors([folder / name for name in names])
    index = {
        "metadata": {"total_size": sum(row.stop - row.start for row in rows.values())},
        "weight_map": {key: row.path.name for key, row in rows.items()},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True), "utf-8")


# ---------------------------------------------------------------- config and tokenizer


def copy_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates, generation config and processor files, byte for byte."""
    for path in sorted({path for kind in _COMPANIONS for path in source.glob(kind)}):
        # A pattern such as vocab* could match weights.
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    copy_templates(source, target)


def copy_templates(source: Path, target: Path) -> None:
    """Copy the folder of additional chat templates, if there is one."""
    if (source / TEMPLATES).is_dir():
        (target / TEMPLATES).mkdir()
        for path in sorted((source / TEMPLATES).glob("*.jinja")):
            shutil.copyfile(path, target / TEMPLATES / path.name)


def write_config(
    source: Path, target: Path, model: Any, *, dtype: str, fields: Mapping[str, Any] | None = None
) -> None:
    """Copy the config of the dense model, with the dtype of the pruned one, and its depth.

    Everything else is unchanged, so that tensors that were carried over can still be loaded.

    Args:
        source: Folder of the dense model.
        target: Folder of the pruned model.
        model: The pruned model.
        dtype: Of its parameters, e.g. `bfloat16`.
        fields: What its text config says otherwise, because blocks were removed.
    """
    config = stored_config(source)
    _set_dtype(config, dtype)
    text = model.config.get_text_config()
    # before the nested ones: a model of one config has no other place for them
    if fields and text is model.config:
        config |= fields
    for key, value in config.items():
        # Of some multimodal configs, transformers loads only `text_config`, as a config of its own.
        text_only = text is model.config and key == "text_config"
        if isinstance(value, dict) and (text_only or getattr(model.config, key, None) is text):
            _set_dtype(value, dtype)
            value |= fields or {}
    config.setdefault("architectures", [type(model).__name__])
    store_config(target, config)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    # torch_dtype is the older name; if a config has both, they must not disagree.
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    config |= dict.fromkeys(names, dtype)


def clean_tokenizer_config(folder: Path) -> None:
    """Remove from the config of a tokenizer made from a GGUF file the traces of its conversion."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text("utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path", "gguf_file"):
        config.pop(name, None)
    if config.get("model_max_length", 0) >= 1e20:  # for transformers, this means unknown
        del config["model_max_length"]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
