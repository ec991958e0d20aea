"""A tiny model of every causal-LM architecture that the installed transformers has.

`SMALL` says what a field of a configuration is worth wherever a configuration has it; `OPTIONS`
what an architecture needs beside. Whatever cannot be built so is in `NOT_BUILT`, with the reason.
"""

import dataclasses
from typing import Any

from torch import nn

from prunebench.testing.tiny_models import random_model

SMALL: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "embed_dim", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "dff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size"), 64),
    **dict.fromkeys(("ffn_hidden_size", "mlp_dim", "dim_ff", "mamba_d_ssm"), 64),
    **dict.fromkeys(("expert_ffn_hidden_size",), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    # depths
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 3),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "depth", "num_global_layers"), 1),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_mamba_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "linear_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_headdim", "query_pre_attn_scalar", "global_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_head_dim": 16,
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "ffn_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "num_expert_group"), 1),
    "zero_expert_num": 2,
    # low ranks and states
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("laurel_rank", "hidden_size_per_layer_input", "adapter_rank"), 8),
    **dict.fromkeys(("mamba_ngroups", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("expand", "mamba_expand"), 2),
    # lengths
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 128),
    **dict.fromkeys(("max_sequence_length",), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 16),
    **dict.fromkeys(("attention_chunk_size", "local_attn_chunk_length"), 16),
    **dict.fromkeys(("lsh_attn_chunk_length",), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "index_topk"), 8),
    # tokens
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "cls_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    # pictures
    **dict.fromkeys(("mm_embed_dim", "output_proj_dims", "hidden_size_global"), 32),
    **dict.fromkeys(("ext_pw_out_channel", "nemo_conv_channels"), 32),
    "mm_posemb_size": 16,
    "image_size": 28,
    "patch_size": 14,
    # the rest
    "num_kv_shared_layers": 0,
    "use_mamba_kernels": False,
    "is_decoder": True,
}  # fmt: skip

_SAME_HEADS = {"num_key_value_heads": 4}
_GEMMA4 = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_DOTS3 = {**_SAME_HEADS, "layer_types": ["indexed_attention"] * 3}
_ZAMBA = {
    "num_hidden_layers": 4,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
}
_WIDE = {"hidden_size": 256, "intermediate_size": 1024}  # little else than linears, as it should be

OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _SAME_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"), _SAME_HEADS),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}},
    "deepseek_v4": _WIDE,
    "dots3_note_text": _DOTS3,
    "dots3_note": {"text_config": _DOTS3},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model"}},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text",
                         "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "hy_v4": {**_WIDE, "moe_intermediate_size": 256},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": _SAME_HEADS,
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_vocab_size": 64},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "recurrent_gemma": {**_WIDE, "lru_width": 256, "num_attention_heads": 16},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "roc_bert": {"pronunciation_vocab_size": 16, "pronunciation_embed_dim": 8,
                 "shape_vocab_size": 16, "shape_embed_dim": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, **_WIDE, "num_key_value_heads": 4, "attention_hidden_size": 512,
              "attention_head_dim": 128},
    "zamba2": {**_ZAMBA, "num_mem_blocks": 1, "mamba_headdim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

NOT_BUILT: dict[str, str] = {
    "dbrx": "its configuration has no rope_theta, which its model reads",
    "dots3_note": "its nested configuration speaks of layers beyond a small depth",
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "it continues the states of another model",
    "gemma4_unified_assistant": "it continues the states of another model",
    "musicgen": "its configuration has no dropout, which its model reads",
    "musicgen_melody": "its configuration has no dropout, which its model reads",
}


def options_of(model_type: str) -> dict[str, Any]:
    """Return the fields of a tiny configuration."""
    from transformers import CONFIG_MAPPING

    options = _options(CONFIG_MAPPING[model_type])
    for name, value in OPTIONS.get(model_type, {}).items():
        if name.endswith("_config"):
            part = value.get("model_type")
            small = _options(CONFIG_MAPPING[part]) if part else options[name]
            options[name] = {**small, **value}
        else:
            options[name] = value
    return options


def _options(kind: Any) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(kind)}
    options = {name: value for name, value in SMALL.items() if name in fields}
    for name, part in kind.sub_configs.items():
        if dataclasses.is_dataclass(part):
            options[name] = {**_options(part), "model_type": part.model_type}
    return options


def tiny_architecture(model_type: str, **options: Any) -> nn.Module:
    """Build a random model, float32 on the CPU; norms and biases are random too.

    Args:
        model_type: A causal language model of transformers.
        options: More fields of the configuration.
    """
    return random_model(model_type, options_of(model_type) | options)
