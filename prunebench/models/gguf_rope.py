"""RoPE scaling and other settings of a GGUF file that transformers does not read.

llama.cpp stores the RoPE frequencies of Llama 3.1 as divisors of the unscaled ones, one for every
pair of channels. transformers ignores that tensor, and would rotate every position wrongly. The
divisors follow from the four settings of the `llama3` scaling, which are recovered here by
comparing the frequencies that they give with the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunebench.errors import IncompatibleData

ROPE_FACTORS = "rope_freqs.weight"
_RTOL = 1e-4
# The same in the configs of Llama 3.1, 3.2 and 3.3; only their `factor` differs.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CONTEXTS = (8192, 4096, 16384, 32768)  # candidates for original_max_position_embeddings
_SETTINGS = {  # name in the file: name in the config
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


def apply_rope_factors(path: Path, model: Any, factors: np.ndarray) -> None:
    """Set `rope_parameters` of the config so that it gives the frequencies of the file.

    Args:
        path: The file, for messages.
        model: As transformers read it.
        factors: Divisors of the unscaled frequencies, [head dimension / 2].

    Raises:
        IncompatibleData: No setting gives these frequencies.
    """
    # np.array copies: the reader's array is a read-only map, of which torch warns; [head dim / 2]
    divisors = torch.as_tensor(np.array(factors), dtype=torch.float32).reshape(-1)
    config = model.config
    plain = _plain_frequencies(config)
    if plain is not None and len(plain) == len(divisors):
        # A reader that knows the scaling has set it in the config already.
        if _close(_frequencies(config), plain / divisors):
            return
        # The largest divisor is `factor`; the original context is the only unknown setting left.
        for context in _CONTEXTS:
            trial = dict(config.rope_parameters)
            trial |= {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
            trial["original_max_position_embeddings"] = context
            if _close(_frequencies(config, trial), plain / divisors):
                config.rope_parameters = trial
                return
    raise IncompatibleData(
        f"{path} scales positions in a way that is not read",
        where=f"its {ROPE_FACTORS} is of no known setting",
        fix="give a folder of safetensors, whose config.json says how",
    )


def apply_attention_scale(config: Any, reader: Any) -> None:
    """Set by what Gemma 3 divides the products of q and k: the file does not say it.

    transformers assumes 256. llama.cpp takes the width of a head, which is 256 in all of them but
    the one of 62 layers (27B), where it is the width of the model over the number of heads.
    """
    if str(reader.fields["general.architecture"].contents()) != "gemma3":
        return
    scalar = config.head_dim
    if config.num_hidden_layers == 62:
        scalar = config.hidden_size // config.num_attention_heads
    config.query_pre_attn_scalar = scalar


def require_same_settings(path: Path, config: Any, reader: Any) -> None:
    """Refuse a file if the config that transformers made of it has other settings.

    Args:
        path: The file, for messages.
        config: As transformers read it.
        reader: From `read_gguf`.

    Raises:
        IncompatibleData: Names a setting that differs.
    """
    architecture = str(reader.fields["general.architecture"].contents())

    def stated(name: str) -> Any:
        field = reader.fields.get(f"{architecture}.{name}")
        return None if field is None else field.contents()

    scaling = stated("rope.scaling.type")
    rope = getattr(config, "rope_parameters", None) or {}
    # Scaling that the reader dropped; if it set any, only the settings below are compared.
    if scaling not in (None, "none") and rope.get("rope_type", "default") in ("default", None):
        raise _otherwise(path, f"{architecture}.rope.scaling.type", scaling, "default")
    # Gemma 3 rotates by two bases: that of its global layers, and that of the sliding ones.
    bases = {"rope.freq_base": rope.get("full_attention", rope).get("rope_theta")}
    bases["rope.freq_base_swa"] = (rope.get("sliding_attention") or {}).get("rope_theta")
    read = bases | {name: getattr(config, field, None) for name, field in _SETTINGS.items()}
    for name, ours in read.items():
        value = stated(name)
        if not isinstance(value, int | float) or ours is None:
            continue
        # The file has float32: an epsilon of 1e-5 is stored as 9.99999975e-06.
        if abs(value - ours) > 1e-6 * max(abs(value), abs(ours)):
            raise _otherwise(path, f"{architecture}.{name}", value, ours)


def _otherwise(path: Path, name: str, value: Any, ours: Any) -> IncompatibleData:
    return IncompatibleData(
        f"{path} says {name} = {value}, and transformers reads {ours}",
        where="the model that is scored would not be the one in the file",
        fix="give a folder of safetensors, whose config.json says it",
    )


def _frequencies(config: Any, parameters: dict[str, Any] | None = None) -> Tensor:
    """Return the RoPE frequencies of a config, [head dimension / 2].

    Args:
        config: Of the model; unchanged afterwards.
        parameters: Used in place of its `rope_parameters`.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    before = config.rope_parameters
    # The functions of transformers take the config, and read the parameters from it.
    config.rope_parameters = dict(parameters or before)
    try:
        kind = config.rope_parameters.get("rope_type", "default")
        # transformers has no function for it in the table: each model computes it itself.
        if kind == "default":
            plain = _plain_frequencies(config)
            assert plain is not None
            return plain
        # Each returns the frequencies, and a factor of their cosines and sines.
        frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
        return frequencies
    finally:
        config.rope_parameters = before


def _plain_frequencies(config: Any) -> Tensor | None:
    """Return the unscaled RoPE frequencies, theta^(-2i / d), or None without RoPE."""
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta")
    if theta is None:
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(width * parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width  # 2i / d, [d / 2]
    return 1.0 / float(theta) ** exponents


def _close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=_RTOL, atol=0.0)
