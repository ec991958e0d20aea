"""Tiny models as GGUF files, written as llama.cpp's converter does: whole, or in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_GEMMA3_NAMES = {
    **_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}


def gguf_tensors(config: Any, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The weights by the names of GGUF.

    The rows of q and k of a Llama are interleaved; the norms of a Gemma 3 are what they multiply
    with, 1 more than in its files, and its output is tied to the embedding.
    """
    tensors: dict[str, np.ndarray] = {}
    gemma = config.model_type == "gemma3_text"
    names = _GEMMA3_NAMES if gemma else _NAMES
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if config.model_type != "llama":
        heads = {}
    for name, tensor in state.items():
        if gemma and name == "lm_head.weight":
            continue
        stem, _, kind = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            index, _, stem = stem.removeprefix("model.layers.").partition(".")
            prefix = f"blk.{index}."
        if kind not in ("weight", "bias"):
            stem, kind = f"{stem}.{kind}", "weight"
        if stem == "mlp.experts.gate_up_proj":
            gate, up = (np.ascontiguousarray(half.float().numpy()) for half in tensor.chunk(2, 1))
            tensors |= {f"{prefix}ffn_gate_exps.weight": gate, f"{prefix}ffn_up_exps.weight": up}
            continue
        short, weight = names[stem], tensor.float().numpy()
        if gemma and short.endswith("norm"):
            weight = weight + 1
        if short in heads:
            rows = weight.reshape(heads[short], 2, -1, *weight.shape[1:])
            weight = rows.swapaxes(1, 2).reshape(weight.shape)
        tensors[f"{prefix}{short}.{kind}"] = np.ascontiguousarray(weight)
    return tensors


def write_gguf(
    path: Path,
    model: Any,
    tensors: dict[str, np.ndarray] | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write one file.

    Args:
        path: Where to.
        model: A tiny Llama, Qwen3-MoE or Gemma 3, for the settings.
        tensors: By default those of the model.
        settings: More keys, without the architecture; numbers or texts.
    """
    config = model.config
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    for name, value in (settings or {}).items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{name}", value)
        else:
            writer.add_float32(f"{architecture}.{name}", value)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_key_length(config.head_dim)
    if architecture == "gemma3":
        _write_gemma_tokenizer(writer, config.vocab_size)
    else:
        _write_tokenizer(writer, config.vocab_size)
    ours = gguf_tensors(config, model.state_dict()) if tensors is None else tensors
    for name, tensor in ours.items():
        writer.add_tensor(name, tensor)
    _finish(writer)
    return path


def split_gguf(path: Path, *, parts: int = 2) -> list[Path]:
    """Cut a file as llama.cpp's gguf-split does: all settings are in the first part."""
    reader = gguf.GGUFReader(path)
    step = -(-len(reader.tensors) // parts)
    files = []
    for number in range(parts):
        file = path.with_name(f"{path.stem}-{number + 1:05}-of-{parts:05}.gguf")
        writer = gguf.GGUFWriter(file, "llama")
        for field in reader.fields.values() if number == 0 else ():
            if field.name != "general.architecture" and not field.name.startswith("GGUF."):
                kind = field.types[0]
                item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type=item)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number * step : (number + 1) * step]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        _finish(writer)
        files.append(file)
    return files


def llama3_factors(config: Any, *, factor: float, context: int = 8192) -> np.ndarray:
    """The divisors of the frequencies, by the formula of llama.cpp's converter."""
    width = config.head_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, width, 2) / width)
    divisors = []
    for frequency in plain:
        length = 2 * np.pi / frequency
        if length < context / 4.0:
            divisors.append(1.0)
        elif length > context / 1.0:
            divisors.append(factor)
        else:
            smooth = (context / length - 1.0) / (4.0 - 1.0)
            divisors.append(1.0 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def same_weights(first: Any, second: Any) -> bool:
    """Whether two models hold the same parameters, bit for bit."""
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def _write_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    from tokenizers import pre_tokenizers

    writer.add_tokenizer_model("gpt2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*alphabet[: size - 1], "ab"])  # what the one merge makes
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _write_gemma_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Specials, then single characters from the space of sentencepiece on."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = ["\u2581", *(chr(ord("!") + number) for number in range(size - len(special) - 1))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *letters])
    writer.add_token_scores([-1000.0] * size)
    types = [gguf.TokenType.CONTROL] * len(special) + [gguf.TokenType.NORMAL] * len(letters)
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
