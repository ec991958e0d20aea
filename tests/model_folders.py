"""Folders of models with everything a checkpoint can have, and files beside the weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prunebench.models.safetensors_files import weight_files
from prunebench.results.store import ResultStore
from prunebench.testing import tiny_model

# ---------------------------------------------------------------- models that have everything


def with_a_tower(folder, byte_tokenizer, *, seed=0):
    """A checkpoint of images and text, whose text model alone is read; with all files beside it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from prunebench.testing.tiny_models import _LLAMA_LIKE

    text = {**_LLAMA_LIKE, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"]}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "depth": 2, "num_heads": 2,
              "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 1,
              "temporal_patch_size": 1, "num_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(seed)
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def with_blocks_ahead(folder, byte_tokenizer):
    """A text model with a block that predicts further tokens, which transformers passes over."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prunebench.testing.tiny_models import _LLAMA_LIKE

    text = {**_LLAMA_LIKE, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"]}  # fmt: skip
    torch.manual_seed(1)
    config = AutoConfig.for_model("qwen3_5_text", **text)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.randn(8, 8).to(torch.float16)
    tensors["mtp.ids"] = torch.arange(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    document = json.loads((folder / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def tied(folder, byte_tokenizer):
    tiny_model("gemma2").to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def mixture(folder, byte_tokenizer):
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def with_a_bias_of_routing(folder, byte_tokenizer):
    """A mixture that has a persistent buffer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prunebench.testing.tiny_models import _LLAMA_LIKE

    options = {**_LLAMA_LIKE, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
               "topk_group": 1, "moe_intermediate_size": 32}  # fmt: skip
    torch.manual_seed(2)
    config = AutoConfig.for_model("glm4_moe", **options)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


MODELS = {"tied": tied, "tower": with_a_tower, "mtp": with_blocks_ahead, "mixture": mixture}
MODELS["buffer"] = with_a_bias_of_routing
EXTRAS = {
    "preprocessor_config.json": '{"size": 28}',
    "processor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "generation_config.json": '{"temperature": 0.9,  "do_sample": false, "eos_token_id": [2, 3]}',
    "special_tokens_map.json": '{"eos_token":   "x"}',
    "merges.txt": "#version: 0.2",
}


def add_extras(folder):
    """Files that must go along as they are; some of them transformers itself would not write."""
    (folder / "additional_chat_templates").mkdir()
    for name, text in EXTRAS.items():
        (folder / name).write_text(text)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 2048}))
    return folder


def all_tensors(folder):
    tensors = {}
    for path in weight_files(Path(folder)):
        tensors |= load_file(path)
    return tensors


def bits(tensor):
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
    )


def scored(root):
    return ResultStore(root / "results").read()[0][-1].model.evaluated_sha256
