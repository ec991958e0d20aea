"""Convert GGUF files to a folder of safetensors, once, with the reader of transformers.

Reading a GGUF takes half a minute for a small model, the folder under a second. The weights are
dequantized to float32, which is exact. transformers refuses to save a model that still has a
quantizer, so its traces are removed first.

Large models come in parts, NAME-00001-of-00003.gguf, of which transformers reads only the one that
it is given; `models.gguf_parts` joins them first. A file with tensors or settings that transformers
ignores (scaling of positions, for example) is refused, see also `models.gguf_rope`.
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
from prunebench.models.gguf_rope import (
    ROPE_FACTORS,
    apply_attention_scale,
    apply_rope_factors,
    require_same_settings,
)
from prunebench.models.load import needs_package, quiet_transformers, require_loaded


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to a folder, completely or not at all.

    Args:
        gguf: One whole file, its parts joined.
        folder: The folder to write.

    Raises:
        IncompatibleData: transformers cannot read the file (damaged, or an unknown architecture),
            or would read a different model.
        MissingResource: It is one of several parts, or a package is not installed.
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
                ignore_mismatched_sizes=True,  # require_loaded names them
                output_loading_info=True,
            )
        except ImportError as error:
            raise needs_package(gguf, error) from error
        except Exception as error:
            if not isinstance(error, UNREADABLE) and type(error) is not Exception:
                raise  # the tokenizers library raises plain Exceptions
            raise unreadable(gguf, error) from error
        _require_whole(gguf, reader, model, info)
        # save_pretrained refuses or writes these marks of a quantized model.
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
    """Refuse a part that was renamed, so that `gguf_parts` could not find the others."""
    count = reader.fields.get("split.count")
    if count is not None and int(count.contents()) > 1:
        number = int(reader.fields["split.no"].contents()) + 1
        raise MissingResource(
            f"{path} is part {number} of {int(count.contents())}, and its name does not say so",
            where="parts are found by their names, NAME-00001-of-00002.gguf",
            fix="give all parts the names that they came with",
        )


def _require_whole(path: Path, reader: Any, model: Any, info: dict[str, Any]) -> None:
    """Refuse a model if transformers ignored a tensor or setting of its file."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    require_loaded(path, model, info, shapes={})
    places = _places(model, reader)
    if places is not None:
        # Stacked experts: the reader skips a matrix that is not in the file.
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
        # Not a weight: it decides how positions are rotated, and becomes a setting of the config.
        if ROPE_FACTORS in unplaced:
            apply_rope_factors(path, model, tensors[ROPE_FACTORS].data)
        _, refused = unplaced_tensors(model, dict.fromkeys(unplaced - {ROPE_FACTORS}))
        require_complete(path, missing=without_tied(model, missing), unplaced=refused)
    apply_attention_scale(model.config, reader)
    require_same_settings(path, model.config, reader)


def _places(model: Any, reader: Any) -> dict[str, str] | None:
    """Return the parameter for every tensor name of the older of two readers, which drops others.

    The newer reader reports what it does not load: for an architecture that it supports, None is
    returned.
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
    # The processor of GPT-2 places this tensor itself, so it is not in the map.
    if architecture == "gpt2":
        places.setdefault("output.weight", "lm_head.weight")
    return places
