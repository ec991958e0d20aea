"""Packed folders in transformers: `AutoModelForCausalLM.from_pretrained("packed/")`.

`import prunebench` registers the quantization method `packed24`, which the `config.json` of a
packed folder names. transformers then builds the model on the meta device, lets `Packed24Quantizer`
replace every linear whose matrix is packed by a `Sparse24Linear`, and reads the files tensor by
tensor into it: no dense matrix is ever in memory.

https://huggingface.co/docs/transformers/main/en/quantization/contribute
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prunebench.checkpoints.packed24_index import SHARDS_INDEX, VERSION, adopt, read_rows
from prunebench.checkpoints.read_packed24 import packed24_tensors
from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.checkpoint_keys import CheckpointKeys, check_tensors
from prunebench.models.safetensors_files import PACKED_NOTICE, StoredTensor, stored_tensors
from prunebench.models.stored_config import PACKED24
from prunebench.sparse24.backends.table import require_backend
from prunebench.sparse24.layer import Sparse24Linear
from prunebench.sparse24.packed import DTYPES
from prunebench.sparse24.policy import Policy

_DEVICES = ("cpu", "cuda")
_DENSE = "prunebench export DIR -o PLAIN --to dense writes a folder that loads everywhere"


class Packed24Config(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed folder.

    Args:
        version: Of the format.
        dtype: Of the packed values, `bfloat16` or `float16`.
        backend: A backend that is used wherever it can be; never saved.

    Raises:
        IncompatibleData: The version is another one.
    """

    def __init__(
        self, *, version: int = VERSION, dtype: str | None = None, backend: str | None = None,
        **unknown: Any,
    ) -> None:  # fmt: skip
        self.quant_method: Any = PACKED24
        self.version, self.dtype, self.backend = version, dtype, backend
        unknown.pop("quant_method", None)
        if version != VERSION or unknown:
            keys = f", with {', '.join(sorted(unknown))}" if unknown else ""
            raise IncompatibleData(
                f"the model is packed24, version {version}{keys}",
                where=f"this prunebench reads version {VERSION}",
                fix="update prunebench, or pack the model again with it",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json says."""
        return {"quant_method": PACKED24, "version": self.version, "dtype": self.dtype}


class Packed24Quantizer(HfQuantizer):  # type: ignore[misc]
    """Loads and saves models with packed 2:4 matrices; called by transformers."""

    requires_calibration = True  # only folders that are packed already are loaded
    quantization_config: Packed24Config

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.transposed: set[str] = set()  # matrices that the dense model stores as [in, out]

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        """Refuse devices that packed weights do not run on.

        Raises:
            IncompatibleData: Names the device.
        """
        places = [*device_map.values()] if isinstance(device_map, dict) else [device_map or "cpu"]
        # "auto" and its like are asked again when they have become devices
        modes = ("auto", "balanced", "balanced_low_0", "sequential")
        types = {_device_type(place) for place in places if place not in modes}
        for strange in sorted(types - {*_DEVICES}):
            raise IncompatibleData(
                f"packed weights do not run on {strange}",
                where=f"there are backends for {' and '.join(_DEVICES)}",
                fix=f"use another device_map; or {_DENSE}",
            )
        if "cuda" in types and not torch.cuda.is_available():
            raise IncompatibleData(
                "device_map asks for cuda, and torch has no CUDA device here",
                fix="use device_map='cpu', or install a torch for CUDA",
            )
        if len(types) > 1:
            raise IncompatibleData(
                "packed weights cannot be offloaded: device_map names both cpu and cuda",
                where="a GPU would read every weight over the bus for each token",
                fix="use a device_map of GPUs only, or device_map='cpu'",
            )
        if self.quantization_config.backend and types:
            require_backend(self.quantization_config.backend, torch.device(types.pop()))

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the files of the weights in the config: it is read before they are looked for."""
        if getattr(config, "transformers_weights", None) == PACKED_NOTICE:
            config.transformers_weights = SHARDS_INDEX
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse a dtype other than that of the packed values.

        Raises:
            IncompatibleData: Names both.
        """
        stored = self.quantization_config.dtype
        if stored and str(dtype) != f"torch.{stored}":
            raise IncompatibleData(
                f"the packed weights are {stored}, and {str(dtype).removeprefix('torch.')} is "
                "asked for",
                where="values are multiplied as they are stored",
                fix=f"leave dtype out, or use dtype=torch.{stored}",
            )
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> nn.Module:
        """Check the folder against its index and the model, and replace the packed linears."""
        assert checkpoint_files
        folder = Path(checkpoint_files[0]).parent
        rows = read_rows(folder / SHARDS_INDEX)
        stored = stored_tensors([Path(name) for name in checkpoint_files])
        dense = packed24_tensors(folder, stored, rows)
        keys = check_tensors(model, dense)
        packed = {name for name, row in rows.items() if row["stored"] == PACKED24}
        self._require_linears(model, keys, packed)
        for name, tensor in keys.stored.items():
            if tensor.name in packed:
                across = bool(rows[tensor.name].get("transposed"))
                if across:
                    self.transposed |= {name, tensor.name}
                _replace(model, name, tensor, across, self.quantization_config.backend)
        return model

    def _require_linears(self, model: nn.Module, keys: CheckpointKeys, packed: set[str]) -> None:
        """Refuse packed matrices that are part of something else than one linear layer."""
        rebuilt = {name: key for name, key in keys.rebuilt.items() if key in packed}
        for name, key in rebuilt.items():
            raise _not_a_linear(key, f"transformers makes {name} from several matrices like it")
        for name in packed & keys.unused.keys():
            raise _not_a_linear(name, "the text model does not use it")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Check the codes, and store every weight as its kernels read it."""
        for name, module in model.named_modules():
            if isinstance(module, Sparse24Linear):
                module.settle(name=f"{name}.weight")
        # an attribute of the object, as transformers has no hook after the files are written
        model.save_pretrained = functools.partial(save_packed, model)
        return model

    def is_serializable(self) -> bool:
        """Return True: the state has the tensors of the files."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether packed weights get gradients: no."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model for a static cache by itself: not measured."""
        return False


def save_packed(model: Any, save_directory: Any, *args: Any, **options: Any) -> None:
    """Save a packed model as a packed folder: `model.save_pretrained` of a loaded one.

    Args:
        model: From `from_pretrained`.
        save_directory: The folder to write.
        *args: Of `PreTrainedModel.save_pretrained`.
        **options: Of `PreTrainedModel.save_pretrained`.

    Raises:
        UsageError: An option asks for files of other names, or for pushing half of them.
    """
    for option in ("push_to_hub", "variant", "distributed_checkpoint"):
        if options.get(option):
            raise UsageError(
                f"a packed model cannot be saved with {option}",
                fix="save it to a folder; model.push_to_hub(name) pushes it",
            )
    type(model).save_pretrained(model, save_directory, *args, **options)
    if args[0] if args else options.get("is_main_process", True):
        adopt(Path(save_directory), model.hf_quantizer.transposed)


def register() -> None:
    """Register the method with transformers; a second call does nothing."""
    if PACKED24 not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(PACKED24)(Packed24Config)
        register_quantizer(PACKED24)(Packed24Quantizer)


def _device_type(place: Any) -> str:
    if isinstance(place, int):  # of an accelerator, as accelerate counts them
        accelerator = torch.accelerator.current_accelerator()
        return accelerator.type if accelerator else "cuda"
    return place if place == "disk" else torch.device(place).type


def _replace(
    model: nn.Module, name: str, tensor: StoredTensor, across: bool, backend: str | None
) -> None:
    """Replace the linear of a packed matrix by an empty `Sparse24Linear` on the meta device."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    conv1d = type(module).__name__ == "Conv1D"  # of GPT-2: stores [in, out]
    if attribute != "weight" or not (conv1d if across else isinstance(module, nn.Linear)):
        raise _not_a_linear(tensor.name, f"it is a part of a {type(module).__name__}")
    dtype = getattr(torch, tensor.dtype)
    assert dtype in DTYPES
    shape = tensor.shape[::-1] if across else tensor.shape
    parent, _, child = path.rpartition(".")
    layer = Sparse24Linear.empty(
        (shape[0], shape[1]),
        dtype,
        bias=module.bias is not None,
        policy=Policy(torch.device("meta"), forced=backend),
    )
    setattr(model.get_submodule(parent), child, layer)


def _not_a_linear(name: str, reason: str) -> IncompatibleData:
    return IncompatibleData(
        f"{name} is packed, and is not the weight of a linear layer", where=reason, fix=_DENSE
    )
