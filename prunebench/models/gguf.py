"""GGUF files, read once by transformers and written as a plain safetensors folder.

Reading a GGUF takes half a minute for a small model, the folder under a second. The weights are
dequantised to float32, which is exact. transformers refuses to save a model that still carries its
quantiser, so the marks of it are removed first.

Large models come in parts, NAME-00001-of-00003.gguf, of which transformers reads the one that it is
given; they are joined before, see `models.gguf_parts`. What the file says and transformers leaves
out (tensors, scaling of positions) is refused by name, see also `models.gguf_rope`.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from prunebench.errors import MissingResource
from prunebench.files import atomic_folder
from prunebench.models.carried import clean_tokenizer_config
from prunebench.models.complete import require_complete, unplaced_tensors, without_tied
from prunebench.models.gguf_parts import UNREADABLE, read_gguf, unreadable
from prunebench.models.gguf_rope import ROPE_FACTORS, apply_rope_factors, require_same_settings
from prunebench.models.load import needs_package, quiet_transformers, require_loaded


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of `gguf`, one whole file, to `folder`, whole or not at all.

    Raises:
        IncompatibleData: transformers cannot read the file (damaged, or an unknown architecture),
            or reads another model than it holds.
        SaveError: The folder cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    reader = read_gguf(gguf)
    _require_one_part(gguf, reader)
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # tqdm's bar, always on
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model, info = AutoModelForCausalLM.from_pretrained(
                **where,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
        except ImportError as error:
            raise needs_package(gguf, error) from error
        except Exception as error:
            if not isinstance(error, UNREADABLE) and type(error) is not Exception:
                raise  # the library tokenizers raises a plain one
            raise unreadable(gguf, error) from error
        _require_whole(gguf, reader, model, info)
        model.hf_quantizer = None
        for owner, name in (
            (model.config, "quantization_config"),
            (model, "is_quantized"),
            (model, "quantization_method"),
        ):
            if name in vars(owner):
                delattr(owner, name)
        with atomic_folder(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            clean_tokenizer_config(part)


def _require_one_part(path: Path, reader: Any) -> None:
    count = reader.fields.get("split.count")
    if count is not None and int(count.contents()) > 1:
        number = int(reader.fields["split.no"].contents()) + 1
        raise MissingResource(
            f"{path} is part {number} of {int(count.contents())}, and its name does not say so",
            where="parts are found by their names, NAME-00001-of-00002.gguf",
            fix="give all parts the names that they came with",
        )


def _require_whole(path: Path, reader: Any, model: Any, info: dict[str, Any]) -> None:
    """Refuse a model that transformers read in part."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    require_loaded(path, model, info, shapes={})
    places = _places(model, reader)
    if places is not None:
        missing = {
            name
            for place, name in places.items()
            if place.endswith("_exps") and f"{place}.weight" not in tensors
        }
        unplaced = {
            name
            for name in tensors
            if name not in places and name.removesuffix(".weight") not in places
        }
        if ROPE_FACTORS in unplaced:
            apply_rope_factors(path, model, tensors[ROPE_FACTORS].data)
        _, refused = unplaced_tensors(model, dict.fromkeys(unplaced - {ROPE_FACTORS}))
        require_complete(path, missing=without_tied(model, missing), unplaced=refused)
    require_same_settings(path, model.config, reader)


def _places(model: Any, reader: Any) -> dict[str, str] | None:
    """Return the parameter of every tensor's name, as the older of two readers has it.

    It drops what it does not know. The newer one, which takes the architecture where it can, tells
    (None here).
    """
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )
    except ImportError:  # a transformers with one reader only
        return None
    architecture = str(reader.fields["general.architecture"].contents())
    if is_gguf_arch_supported(architecture):
        return None
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    places: dict[str, str] = get_gguf_hf_weights_map(model, processor(config={}))
    if architecture == "gpt2":
        places.setdefault("output.weight", "lm_head.weight")
    return places
