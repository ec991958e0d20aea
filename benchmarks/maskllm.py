"""Figures of learned masks: what a training step costs beside a plain one of the same tokens."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.figures import (
    Figure,
    at_most,
    default_model,
    default_tokens,
    figure,
    noted,
)

_WINDOWS = 8  # of 512 tokens: 4,096 a step
_ROUNDS = 2


def dense_step(model: Any, tokens: Any) -> float:
    """Forward and backward with weight gradients of the linears, no optimizer; two at a time."""
    from prunebench.models.linears import find_linears

    linears = find_linears(model)
    for linear in linears:
        linear.module.weight.requires_grad_(True)
    start_time = time.perf_counter()
    for batch in tokens.split(2):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    seconds = time.perf_counter() - start_time
    for linear in linears:
        linear.module.weight.requires_grad_(False)
        linear.module.weight.grad = None
    return seconds


def _learner(model: Any, preset: str) -> Any:
    from prunebench.models.walker import BlockWalker
    from prunebench.pruners.maskllm.candidates import candidates
    from prunebench.pruners.maskllm.method import MaskLLM
    from prunebench.training.shards import Shards

    method = MaskLLM(preset=preset, prior="scratch", batch=_WINDOWS, train_seqlen=512)
    learner = method.filled().learner(BlockWalker(model), None, candidates(2, 4), Shards())
    return learner


@figure("maskllm-step")
def maskllm_step() -> list[Figure]:
    """A step of 4,096 tokens, of a dense step of the same tokens."""
    import torch

    from prunebench.models.replay import plain_inference

    model, tokens = default_model(), default_tokens()[:_WINDOWS]
    figures = []
    for preset in ("laptop", "paper"):
        learner = _learner(model, preset)
        ratios = []
        with plain_inference(model), torch.enable_grad():
            learner._backward.prepare(tokens[:1, :128])
            learner._step(0, tokens)
            for step in range(1, 1 + _ROUNDS):
                before = dense_step(model, tokens)
                start_time = time.perf_counter()
                learner._step(step, tokens)
                taken = time.perf_counter() - start_time
                ratios.append(2 * taken / (before + dense_step(model, tokens)))
        figures.append(at_most(f"maskllm-step-{preset}", 2.0, "of a dense step", ratios))
    figures.append(_mask_pass(learner))
    return figures


def _mask_pass(learner: Any) -> Figure:
    """Bandwidth of making all soft masks once, without noise: what is read and written."""
    import dataclasses

    import torch

    from prunebench.pruners.maskllm import dispatch

    calm = dataclasses.replace(learner.schedule.relaxation(0, seed=0, draw=0), noise=0.0)
    moved = sum(
        4 * layer.logits.numel() + 8 * linear.size for linear, layer in learner.layers.items()
    )
    rates = []
    for _ in range(3):
        start_time = time.perf_counter()
        for linear, layer in learner.layers.items():
            dispatch.soften(layer, linear.stored, calm, torch.empty_like(linear.stored))
        rates.append(moved / 1e9 / (time.perf_counter() - start_time))
    return noted("maskllm-mask-pass", "GB/s", rates)
