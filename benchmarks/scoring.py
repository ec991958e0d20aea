"""Figures of scoring: perplexity against plain forward passes, and bfloat16 against float32."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.figures import (
    Figure,
    at_least,
    default_model,
    default_tokens,
    figure,
    noted,
    plain_seconds,
    prune_seconds,
)

# ---------------------------------------------------------------- evaluation


@figure("ppl-throughput")
def ppl_throughput() -> list[Figure]:
    """Perplexity against a plain forward pass of the whole model on the same windows."""
    import torch

    from prunebench.evaluate.perplexity import token_ppl

    model, tokens = default_model(), default_tokens()[:8]
    runs = []
    for attempt in range(5):
        start_time = time.perf_counter()
        with torch.no_grad():
            for window in torch.split(tokens, 1):
                model(input_ids=window, use_cache=False)
        middle = time.perf_counter()
        token_ppl(model, tokens)
        if attempt:
            runs.append((middle - start_time) / (time.perf_counter() - middle))
    return [at_least("ppl-throughput", 0.9, "of a plain forward pass", runs)]


@figure("bf16")
def bf16() -> list[Figure]:
    """Pruning and scoring in bfloat16 against float32, where the CPU has native bfloat16."""
    from prunebench.evaluate.perplexity import token_ppl

    tokens = default_tokens()[:8]
    prune, score = [], []
    for _ in range(3):
        seconds = {}
        for dtype in ("float32", "bfloat16"):
            model = default_model(dtype)
            plain_seconds(model, tokens[:2])
            start_time = time.perf_counter()
            token_ppl(model, tokens)
            seconds[dtype, "score"] = time.perf_counter() - start_time
            seconds[dtype, "prune"] = prune_seconds(
                "wanda", model, tokens, sparsity="2:4", within_block="joint"
            )
        prune.append(seconds["float32", "prune"] / seconds["bfloat16", "prune"])
        score.append(seconds["float32", "score"] / seconds["bfloat16", "score"])
    cpuinfo = Path("/proc/cpuinfo")
    native = cpuinfo.is_file() and "bf16" in cpuinfo.read_text("utf-8")
    unit = "times float32"
    if not native:
        return [noted("bf16-prune", unit, prune), noted("bf16-score", unit, score)]
    return [at_least("bf16-prune", 1.5, unit, prune), at_least("bf16-score", 1.5, unit, score)]
