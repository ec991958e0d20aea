"""Ways to read a model for tests, and a folder in FP8."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prunebench.checkpoints.packed24 import unpacked
from prunebench.models.disk import load_on_disk
from prunebench.models.journal import RunJournal
from prunebench.models.load import load_config, load_model
from prunebench.models.source import LocalModel, ModelSource, fetch_model, find_model
from prunebench.progress import Silent

CPU = torch.device("cpu")


def resident(folder: Path, tmp_path: Path):
    """All of it in memory, in float32."""
    return load_model(folder, dtype=torch.float32, device=CPU)


def disk(folder: Path, tmp_path: Path):
    """A block at a time, in float32."""
    journal = RunJournal(tmp_path / "kept")
    journal.lock()
    return load_on_disk(
        folder, load_config(folder), dtype=torch.float32, device=CPU, journal=journal
    )


def converted(file, tmp_path):
    """A GGUF file, by way of its converted folder."""
    return resident(fetch_model(find_model(str(file)), Silent()).path, tmp_path)


def with_config(folder, **update):
    """Change the config of a folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | update))


def to_fp8(folder, block=(32, 32)):
    """Store the matrices of the blocks as float8 with a scale a block; return them by hand."""
    tensors, stored, dense = load_file(folder / "model.safetensors"), {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            grid = (-(-rows // block[0]), -(-columns // block[1]))
            scale = torch.rand(grid, generator=generator) + 0.5
            small = tensor.to(torch.float8_e4m3fn)
            stored |= {name: small, f"{name}_scale_inv": scale}
            factors = torch.kron(scale, torch.ones(block))[:rows, :columns]
            dense[name] = small.float() * factors
        else:
            stored[name] = dense[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "activation_scheme": "dynamic",
    }
    with_config(folder, quantization_config=settings)
    return dense


def dequantized(folder):
    """The folder in which its weights are dense."""
    local = LocalModel(ModelSource("fp8", "folder", str(folder)), folder, f"sha256:{folder}")
    return unpacked(local, Silent()).path
