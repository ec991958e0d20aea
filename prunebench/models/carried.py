"""What a checkpoint holds beside the text model: it is carried over as it is.

A vision tower, blocks that predict several tokens ahead, the files of an image processor: pruning
does not touch them, the config goes on to promise them, and so every saved folder has them too,
byte for byte.
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
from prunebench.models.stored_config import stored_config
from prunebench.models.stored_model import StoredModel, saved_names, stored_model

TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps chat templates beyond the first."""

_COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "*.model", "*.tiktoken", "normalizer.json", "chat_template*", "*.jinja",
    "generation_config.json", "*processor_config.json",
)  # fmt: skip


def carried_tensors(source: StoredModel) -> dict[str, StoredTensor]:
    """Return the tensors that a text model has no place for, by their names in the files."""
    return {
        key: tensor for key, tensor in source.unused.items() if not is_harmless(key, tensor.shape)
    }


def require_carriable(folder: Path, model: nn.Module) -> None:
    """Refuse, before the work, a model that could not be saved with what it does not use.

    Only together are they a model, and so the names must go on to fit: those that transformers
    gives to what it saves must be those of the files.

    Args:
        folder: The dense model.
        model: Built from its config, on any device.

    Raises:
        IncompatibleData: They would not fit.
    """
    source = stored_model(model, stored_tensors(weight_files(folder)))
    carried = carried_tensors(source)
    others = sorted(saved_names(model, source) - source.names) if carried else []
    if others:
        raise IncompatibleData(
            f"{folder} cannot be saved with the {len(carried)} tensors that the text model does "
            "not use",
            where=f"transformers would write {others[0]}, which is no name of its files; what is "
            f"not used begins with {min(carried)}",
            fix="use --weights disk, which keeps the names, or run without --save-model",
        )


# ---------------------------------------------------------------- writing


def write_stored(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file of tensors of other files, under these names, a piece at a time.

    Raises:
        IncompatibleData: A file has become shorter.
        OSError: The disk is full.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.stop - tensor.start
        header[name] = {
            "dtype": DTYPE_CODES.get(tensor.dtype, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                stream.write(piece)


def add_carried(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Add tensors to a folder that holds a model already: one more shard, and a new index.

    Raises:
        IncompatibleData: A file has become shorter.
        OSError: The disk is full.
    """
    if not tensors:
        return
    files = weight_files(folder)
    count = len(files) + 1
    (folder / INDEX_NAME).unlink(missing_ok=True)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for old, new in zip(files, names, strict=False):
        old.rename(folder / new)
    write_stored(folder / names[-1], tensors)
    write_index(folder, names)


def write_index(folder: Path, names: Iterable[str]) -> None:
    """Write the index of a model in several files."""
    rows = stored_tensors([folder / name for name in names])
    index = {
        "metadata": {"total_size": sum(row.stop - row.start for row in rows.values())},
        "weight_map": {key: row.path.name for key, row in rows.items()},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1, sort_keys=True), "utf-8")


# ---------------------------------------------------------------- what is no weight


def copy_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates, generation settings and processors, byte for byte."""
    for path in sorted({path for kind in _COMPANIONS for path in source.glob(kind)}):
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
    copy_templates(source, target)


def copy_templates(source: Path, target: Path) -> None:
    """Copy the folder of further chat templates, if there is one."""
    if (source / TEMPLATES).is_dir():
        (target / TEMPLATES).mkdir()
        for path in sorted((source / TEMPLATES).glob("*.jinja")):
            shutil.copyfile(path, target / TEMPLATES / path.name)


def write_config(source: Path, target: Path, model: Any, *, dtype: str) -> None:
    """Write the config of a source with another dtype; all else is as it came.

    So what is carried over can still be loaded.

    Args:
        source: The dense model.
        target: The folder of the saved model.
        model: What is saved.
        dtype: Of its parameters, e.g. `bfloat16`.
    """
    config = stored_config(source)
    _set_dtype(config, dtype)
    text = model.config.get_text_config()
    for key, value in config.items():
        alone = text is model.config and key == "text_config"  # transformers took only this part
        if isinstance(value, dict) and (alone or getattr(model.config, key, None) is text):
            _set_dtype(value, dtype)
    config.setdefault("architectures", [type(model).__name__])
    text_of = json.dumps(config, indent=2, ensure_ascii=False)
    (target / "config.json").write_text(text_of + "\n", encoding="utf-8")


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    config |= dict.fromkeys(names, dtype)


def clean_tokenizer_config(folder: Path) -> None:
    """Take out of a tokenizer that was written from a GGUF file what says only how it was read."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text("utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path", "gguf_file"):
        config.pop(name, None)
    if config.get("model_max_length", 0) >= 1e20:  # transformers' word for "unknown"
        del config["model_max_length"]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
