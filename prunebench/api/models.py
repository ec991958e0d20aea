"""Models for the Python API: their folders, and what can be used of those in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from prunebench.checkpoints.packed24 import kind_of
from prunebench.checkpoints.packed24_index import SHARDS_INDEX, has_settings, read_rows
from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.in_memory import evaluation_mode, require_causal
from prunebench.models.load import load_whole
from prunebench.models.source import fetch_model as fetch
from prunebench.models.source import find_model
from prunebench.progress import Progress, Silent, quiet_libraries


def fetch_model(name: str, *, progress: Progress | None = None) -> Path:
    """Return the folder of a model, downloaded or converted first if needed.

    Args:
        name: An alias of `prunebench list models`, org/name of the hub, or a .gguf file.
        progress: Called with the stages; by default nothing is shown.

    Raises:
        UsageError: The name is unknown.
        MissingResource: It cannot be downloaded.
    """
    with quiet_libraries():
        return fetch(find_model(name), progress or Silent()).path


def load(name: str | Path, *, backend: str | None = None, **options: Any) -> Any:
    """Return a model for inference; packed 2:4 matrices stay packed, and are never dense in memory.

    The same as `AutoModelForCausalLM.from_pretrained` after `import prunebench`.

    Args:
        name: A packed folder, a plain one, org/name of the hub, or an alias of `prunebench list
            models`.
        backend: Of packed matrices, see docs/sparse24.md; by default the fastest that is known.
        **options: Of `from_pretrained`, e.g. `device_map="cuda"`.

    Raises:
        MissingResource: There is no such model.
        IncompatibleData: A packed folder is of another version, lacks a tensor, has one too many,
            or holds codes that are no 2:4 code; or its device has no backend. A plain folder lacks
            a tensor, has one too many, does not fit its config, or is quantized.
        UsageError: `backend` is unknown, cannot be used there, or the folder is not packed.

    Example:
        >>> import prunebench
        >>> model = prunebench.load("packed/")  # doctest: +SKIP
        >>> model.generate(**tokenizer("Once upon", return_tensors="pt"))  # doctest: +SKIP
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(name) if Path(name).is_dir() else fetch_model(str(name))
    if kind_of(folder) != "packed24":
        if backend is not None:
            raise UsageError(
                f"{folder} is not packed, and only packed matrices have a backend",
                fix="leave backend out, or prunebench export it with --to packed24",
            )
        return load_whole(folder, **options)
    if not has_settings(folder):
        raise IncompatibleData(
            f"{folder} was packed before transformers could load such folders",
            where="its config.json does not name the format",
            fix=f"prunebench export {folder} -o NEW --to packed24 writes it again",
        )
    read_rows(folder / SHARDS_INDEX)  # what is damaged is named before transformers reads it
    config: Any = AutoConfig.from_pretrained(folder)
    if backend is not None:
        config.quantization_config["backend"] = backend
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **options)


@contextlib.contextmanager
def usable_model(model: nn.Module) -> Iterator[None]:
    """Refuse what is no causal language model, and evaluate it as a run does."""
    require_causal(model)
    with evaluation_mode(model):
        yield
