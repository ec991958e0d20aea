"""Hash the weights of a model and its tokenizer, and say what else decides what it computes.

The hash of the weights does not depend on how their files are laid out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from prunebench.models.linears import find_blocks
from prunebench.models.stored_model import kept_buffers
from prunebench.models.tensor_files import bytes_of
from prunebench.models.weights import weights_of

_TOKENIZER_SETTINGS = (
    "bos_token", "eos_token", "unk_token", "model_max_length", "clean_up_tokenization_spaces",
    "chat_template",
)  # fmt: skip


def hash_weights(
    model: nn.Module,
    *,
    look: Callable[[int], None] = lambda index: None,
    advance: Callable[[int], None] = lambda done: None,
) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of every parameter, sorted by name.

    `safetensors_files.hash_stored` computes the same hash from the files.

    Args:
        model: The model; blocks that are on disk are read one at a time.
        look: Called with the index of each block while its weights are in memory, so that they need
            not be read again.
        advance: Called with 1 after each block.
    """
    digest = hashlib.sha256()
    prefix, _ = find_blocks(model)
    weights = weights_of(model)
    names = sorted(name for name, _ in model.named_parameters())
    # Sorted by name, block 10 comes before block 2: the order of the hash, not of the model.
    runs = [(index, list(run)) for index, run in itertools.groupby(names, block_index_of(prefix))]
    order = [index for index, _ in runs if index is not None]
    following = dict(zip(order, [*order[1:], order[-1]], strict=True))  # to prefetch from disk
    for index, members in runs:
        if index is None:  # embeddings, final norm, head: always in memory
            _hash_parameters(model, members, digest)
            continue
        with weights.open_block(index, then=following[index]):
            _hash_parameters(model, members, digest)
            look(index)
        advance(1)
    return digest.hexdigest()


def settings_text(model: nn.Module) -> str:
    """Return what decides, beside the weights, what a model computes: config and stored buffers.

    With another config (RoPE, activation) or another buffer (the bias of a router) the same weights
    compute another function. The config is JSON, `{}` without one.
    """
    config: Any = getattr(model, "config", None)
    # The path of the folder does not change the function.
    settings = {**config.to_dict(), "_name_or_path": None} if config is not None else {}
    buffers = hash_buffers(model)
    parts = [settings, buffers] if buffers else [settings]
    return "".join(json.dumps(part, sort_keys=True, default=str) for part in parts)


def hash_buffers(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of each persistent buffer, the same as `hash_stored` of it in a file.

    Blocks on disk that have some are read.
    """
    prefix, _ = find_blocks(model)
    weights = weights_of(model)
    hashes: dict[str, str] = {}
    # The buffers of a block are listed together, so each block is opened once.
    for index, names in itertools.groupby(kept_buffers(model), block_index_of(prefix)):
        with nullcontext() if index is None else weights.open_block(index):
            for name in names:
                digest = hashlib.sha256()
                _hash_tensor(name, model.get_buffer(name), digest)
                hashes[name] = digest.hexdigest()
    return hashes


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the SHA-256 of what turns a text into tokens and back, the chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        # the state of the last call, as the padding token is: not the tokenizer's own
        rules["truncation"] = rules["padding"] = None
    settings = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS}
    facts = [type(tokenizer).__name__, rules, settings]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def block_index_of(prefix: str) -> Callable[[str], int | None]:
    """Return a function from a parameter's name to the index of its block, or None."""

    def block(name: str) -> int | None:
        inside = name.startswith(f"{prefix}.")
        return int(name[len(prefix) + 1 :].partition(".")[0]) if inside else None

    return block


def _hash_parameters(model: nn.Module, names: list[str], digest: Any) -> None:
    for name in names:
        _hash_tensor(name, model.get_parameter(name), digest)


def _hash_tensor(name: str, tensor: Tensor, digest: Any) -> None:
    # Dtype and shape fix how many bytes follow: two models never give the same stream.
    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    digest.update(bytes_of(tensor).data)
