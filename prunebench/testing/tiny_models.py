"""Tiny random models of every architecture, and tokens for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.models.load import quiet_transformers

VOCABULARY = 256
CONTEXT = 128

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention: k and v are narrower than q
    "max_position_embeddings": CONTEXT,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OLDER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    # windows shorter than the 24 tokens of `tiny_tokens`, so that the sliding mask matters
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": 16}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", _LLAMA_LIKE),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", _LLAMA_LIKE),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "opt": (
        "opt",
        {**_OLDER, "ffn_dim": 64, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 32},
    ),
    "gpt_neox": (
        "gpt_neox",
        {**_OLDER, "intermediate_size": 64, "max_position_embeddings": CONTEXT},
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": CONTEXT,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": (
        "bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 3,
            "n_head": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "falcon": ("falcon", _OLDER),
    "mixtral": (
        "mixtral",
        {**_LLAMA_LIKE, **_EXPERTS, "num_local_experts": 4, "sliding_window": None},
    ),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA_LIKE, **_EXPERTS, "num_experts": 4}),
}

ARCHITECTURES: tuple[str, ...] = tuple(_ARCHITECTURES)
FUSED_EXPERTS: tuple[str, ...] = ("mixtral", "qwen3_moe")


def tiny_model(architecture: str, *, seed: int = 0) -> nn.Module:
    """Build a random model of three blocks and about 32 channels, float32 on the CPU.

    Args:
        architecture: One of `ARCHITECTURES`.
        seed: Determines the weights; norms and biases are random too, so that they matter.
    """
    model_type, options = _ARCHITECTURES[architecture]
    return random_model(model_type, options, seed=seed)


def random_model(model_type: str, options: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Build a random model of any architecture, float32 on the CPU.

    Args:
        model_type: A causal language model of transformers.
        options: Fields of its configuration.
        seed: Determines the weights; norms and biases are random too, so that they matter.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # the caller's random state stays as it was
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **options), dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in model.parameters():
                # added to the architecture's own initialization: norms stay near 1, and biases are
                # no longer 0
                scale = 0.1 if parameter.ndim == 1 else 0.5 / parameter.shape[-1] ** 0.5
                parameter.add_(torch.randn_like(parameter) * scale)
    model.requires_grad_(False)
    return model.eval()


def tiny_tokens(*, samples: int = 6, seqlen: int = 24, seed: int = 0) -> Tensor:
    """Return random token windows for `tiny_model`, int64 (samples, seqlen)."""
    generator = torch.Generator().manual_seed(seed)
    # ids 0 to 2 are padding, BOS and EOS
    return torch.randint(3, VOCABULARY, (samples, seqlen), generator=generator)
