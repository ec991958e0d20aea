"""GGUF files, read once by transformers and written as a plain safetensors folder.

Reading a GGUF takes half a minute for a small model, the folder under a second. The weights are
dequantised to float32, which is exact. transformers refuses to save a model that still carries its
quantiser, so the marks of it are removed first.
"""

from __future__ import annotations

from pathlib import Path

from prunebench.errors import IncompatibleData
from prunebench.files import atomic_folder
from prunebench.models.carried import clean_tokenizer_config
from prunebench.models.load import quiet_transformers


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of `gguf` to `folder`, whole or not at all.

    Raises:
        IncompatibleData: transformers cannot read the file (damaged, or an unknown architecture).
        SaveError: The folder cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        except (ValueError, KeyError, OSError, RuntimeError, IndexError) as error:
            raise IncompatibleData(
                f"{gguf} cannot be read as a GGUF model",
                where=str(error).splitlines()[0][:200],
                fix="copy the file again, or give a folder of safetensors",
            ) from error
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
