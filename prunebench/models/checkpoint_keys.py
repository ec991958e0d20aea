"""Which tensor of a checkpoint is which parameter of the model, if that is a question of names.

transformers renames some keys when it loads a checkpoint, and rebuilds other tensors (it fuses the
experts of a mixture, for example). What is only renamed can be read straight from the file, a block
at a time; what is rebuilt cannot, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunebench.errors import IncompatibleData
from prunebench.models.safetensors_files import StoredTensor


@dataclass(frozen=True)
class CheckpointKeys:
    """Where the parameters and persistent buffers of a model lie in its files.

    Attributes:
        stored: By name in the model.
        missing: Names that no file holds: tied to another one, or an error.
    """

    stored: dict[str, StoredTensor]
    missing: set[str]


def match_keys(
    model: nn.Module, stored: Mapping[str, StoredTensor], *, dtype: torch.dtype
) -> CheckpointKeys:
    """Match the tensors of a checkpoint with a model that was built from its config.

    Args:
        model: The model, its parameters on any device.
        stored: What the files hold, from `stored_tensors`.
        dtype: Of the run.

    Raises:
        IncompatibleData: The architecture or the checkpoint needs more than names, or a shape
            differs.
    """
    _require_plain(model, dtype)
    wanted = model.state_dict()
    transforms = _transforms(model)
    found: dict[str, StoredTensor] = {}
    for key, one in stored.items():
        name, rebuilt = _name_in_model(model, key, wanted, transforms)
        if name not in wanted:
            continue  # transformers ignores what it does not know
        if rebuilt or name in found:
            raise not_on_disk(
                type(model).__name__, f"transformers makes {name} from several tensors like {key}"
            )
        if tuple(wanted[name].shape) != one.shape:
            raise IncompatibleData(
                f"{one.path} does not fit its config",
                where=f"{key} is {list(one.shape)}, the model has {list(wanted[name].shape)}",
                fix="check that config.json and the safetensors belong together",
            )
        if wanted[name].is_floating_point() and "float" not in one.dtype:
            raise not_on_disk(type(model).__name__, f"{key} is quantised ({one.dtype})")
        found[name] = one
    return CheckpointKeys(found, set(wanted) - set(found))


def _name_in_model(
    model: Any, key: str, wanted: Mapping[str, Any], transforms: tuple[list[Any], list[Any]]
) -> tuple[str, bool]:
    """Return the name of a checkpoint's tensor in the model, and whether it is only a part."""
    from transformers.core_model_loading import rename_source_key

    name, pattern = rename_source_key(key, *transforms, model.base_model_prefix, wanted)
    if name not in wanted and key in wanted:
        return key, False
    return name, pattern is not None


def _transforms(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return what transformers does to the keys of this architecture: renaming, rebuilding."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model)
    return (
        [step for step in steps if isinstance(step, WeightRenaming)],
        [step for step in steps if isinstance(step, WeightConverter)],
    )


def _require_plain(model: Any, dtype: torch.dtype) -> None:
    name = type(model).__name__
    if getattr(model.config, "quantization_config", None):
        raise not_on_disk(name, "the checkpoint is quantised")
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    loose = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = {torch.float16: {*strict, *loose}, torch.bfloat16: {*strict}}.get(dtype)
    if kept:
        raise not_on_disk(name, f"transformers keeps {sorted(kept)[0]} in float32")


def not_on_disk(architecture: str, reason: str) -> IncompatibleData:
    """Return the refusal of `--weights disk` for an architecture."""
    return IncompatibleData(
        f"--weights disk does not fit {architecture}",
        where=reason,
        fix="use --weights resident, on a machine that holds the whole model",
    )
