"""The options of `maskllm` that a preset sets: the paper's recipe, and what fits smaller machines.

`paper` is arXiv 2409.17481 (section 4, table 7 and appendix) with what its code does where the text
is silent. `lite` is the same recipe with 13 million tokens. `laptop` uses mirror descent without
noise: in a few dozen small steps AdamW mostly learns noise.
"""

from __future__ import annotations

from prunebench.spec import OptionValue

_PAPER: dict[str, OptionValue] = {
    "steps": 2000,
    "batch": 256,
    "train_seqlen": 4096,
    "held_out": 16,
    "eval_every": 50,
    "save_every": 100,
    "prior": "sparsegpt",
    "prior_strength": 3.0,
    "logit_std": 0.01,
    "prior_noise": 1.0,
    "noise": 1.0,
    "temperature": 4.0,
    "last_temperature": 0.05,
    "scale": 100.0,
    "last_scale": 500.0,
    "optimizer": "adamw",
    "rate": 5e-4,
    "last_rate": 0.1,
    "beta1": 0.9,
    "weight_decay": 0.1,
    "clip": 1.0,
    "outlier": 20.0,
    "reward": 1e-5,
    "curvature": 0.0,
}

PRESETS: dict[str, dict[str, OptionValue]] = {
    "paper": _PAPER,
    "lite": _PAPER
    | {
        "steps": 200,
        "batch": 32,
        "train_seqlen": 2048,
        "eval_every": 10,
        "save_every": 50,
        "prior_noise": 0.1,
    },
    "laptop": _PAPER
    | {
        "steps": 24,
        "batch": 4,
        "train_seqlen": 512,
        "held_out": 8,
        "eval_every": 4,
        "save_every": 4,
        "prior": "wanda",
        "logit_std": 1.0,
        "prior_noise": 0.1,
        "noise": 0.0,
        "temperature": 0.5,
        "last_temperature": 0.1,
        "scale": 1.0,
        "last_scale": 1.0,
        "optimizer": "mirror",
        "rate": 0.05,
        "outlier": 1.5,
        "weight_decay": 0.0,
        "clip": 0.0,
        "reward": 0.0,
        "curvature": 1.0,
    },
}
