"""Figures of the recovery: its time against plain forward passes, and the memory it adds."""

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
    plain_seconds,
)

METHOD, SPARSITY, BLOCKS = "wanda", "2:4", 3


def _first_blocks() -> Any:
    """Return the default model with its first blocks only: all blocks are of one size."""
    model = default_model()
    model.model.layers = model.model.layers[:BLOCKS]
    return model


def _prune(model: Any, tokens: Any, *, recoverer: Any = None) -> None:
    """Prune a model, joint, with or without recovery."""
    from prunebench.models.pruned_block import Recovery
    from prunebench.models.walker import BlockWalker
    from prunebench.pruners import METHODS
    from prunebench.sparsity import Sparsity

    recovery = None if recoverer is None else Recovery(recoverer)
    walker = BlockWalker(model, token_ids=tokens, within_block="joint", recovery=recovery)
    target = Sparsity.parse(SPARSITY)
    METHODS.make(METHOD, {}).prune(walker, {linear.name: target for linear in walker.linears})


def _seconds(tokens: Any, *, recoverer: Any = None) -> float:
    model = _first_blocks()
    plain_seconds(model, tokens[:2])  # warm
    start_time = time.perf_counter()
    _prune(model, tokens, recoverer=recoverer)
    return time.perf_counter() - start_time


@figure("recover-block")
def recover_block() -> list[Figure]:
    """Three epochs of `block` on top of the pruning, in units of two plain passes of the blocks."""
    from prunebench.recovery.block import Block

    tokens = default_tokens()
    model = _first_blocks()
    plain_seconds(model, tokens[:2])  # warm
    plain = plain_seconds(model, tokens)
    pruned = _seconds(tokens)
    recovered = _seconds(tokens, recoverer=Block())
    again = plain_seconds(model, tokens)
    halves = _seconds(tokens, recoverer=Block(halves=True))
    ratio = (recovered - pruned) / (plain + again)
    return [
        at_most("recover-block", 5.5, "times two plain passes", [ratio]),
        noted("recover-block-halves", "of all at once", [(halves - pruned) / (recovered - pruned)]),
    ]


@figure("recover-memory")
def recover_memory() -> list[Figure]:
    """Peak bytes of tensors that `block` adds to pruning, over its allowance.

    The allowance is a block in float32 four times (master, gradient, two moments) and the dense
    stream; the graph of a batch is counted from the config and comes on top.
    """
    import torch

    from prunebench.models.footprint import Footprint, count_footprint
    from prunebench.recovery.block import Block

    tokens = default_tokens()[:8]
    model = _first_blocks()
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    stream = tokens.numel() * model.config.hidden_size * 4
    counted = count_footprint(
        model.config, torch.float32, calibration=(2, tokens.shape[1]), scoring=(1, 8),
        hessian=False, trained=2,
    )  # fmt: skip
    with Footprint() as pruning:
        _prune(model, tokens)
    model = _first_blocks()
    with Footprint() as recovering:
        _prune(model, tokens, recoverer=Block(epochs=1, checks=1))
    # `training` holds the gradients
    allowed = pruning.peak + 3 * 4 * block + stream + counted.training
    return [
        at_most("recover-memory", 1.0, "of pruning, 4 blocks, stream", [recovering.peak / allowed]),
        noted("recover-memory-bytes", "MB", [recovering.peak / 1e6]),
    ]


@figure("recover-distill-step")
def recover_distill_step() -> list[Figure]:
    """A step of `distill`, of 1.35 dense training steps plus one forward pass, the same tokens."""
    import torch

    from benchmarks.maskllm import dense_step
    from prunebench.models.linears import find_linears
    from prunebench.models.replay import plain_inference
    from prunebench.recovery.distill.loop import Distiller
    from prunebench.recovery.distill.recoverer import Distill
    from prunebench.recovery.distill.weights import FullWeight
    from prunebench.training.shards import Shards

    windows = 4
    model, tokens = default_model(), default_tokens()[:windows]
    dense = {linear.name: linear.stored.clone() for linear in find_linears(model)}
    _prune(model, tokens)
    weights = {}
    for linear in find_linears(model):
        weights[linear] = FullWeight(linear.stored.clone(), 0.2)
        linear.stored.copy_(dense.pop(linear.name))
    loop = Distiller(model, weights, Distill(batch=windows).filled(), Shards())
    ratios, seconds = [], []
    with plain_inference(model), torch.enable_grad():
        loop._backward.prepare(tokens[:1, :128])
        loop._step(0, tokens)
        for step in range(1, 3):
            before = dense_step(model, tokens)
            start_time = time.perf_counter()
            loop._step(step, tokens)
            seconds.append(time.perf_counter() - start_time)
            trained = (before + dense_step(model, tokens)) / 2
            start_time = time.perf_counter()
            with torch.no_grad():
                for batch in tokens.split(2):
                    model(input_ids=batch, use_cache=False)
            forward = time.perf_counter() - start_time
            ratios.append(seconds[-1] / (1.35 * trained + forward))
    return [
        at_most(
            "recover-distill-step", 1.0, "of 1.35 dense training steps and a forward pass", ratios
        ),
        noted("recover-distill-step-seconds", "s", seconds),
    ]
