"""Pruning at the shapes of LLaMA-2-7B: whole methods on two blocks, then each stage by itself.

The calibration set is that of the papers, 128 windows of 2,048 tokens; two blocks of random
weights take as long as any two, so a model of 32 takes 16 times the seconds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_acceptance.measure import llama, llama_sizes, random_windows, seconds_of
from benchmarks.gpu_acceptance.record import Recorder
from prunebench.calibration.hessian import factorize
from prunebench.calibration.stats import InputStats, StatsAccumulator
from prunebench.models.gradients import gradient_norms
from prunebench.models.linears import find_linears
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.pruners.keep import keep_matrix, keep_rows
from prunebench.pruners.sparsegpt import SparseGPT
from prunebench.sparsity import Sparsity

BLOCKS, OF_BLOCKS = 2, 32
_FIRST: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("wanda", "2:4", {}, 3.0),
    ("sparsegpt", "2:4", {}, 12.0),
    ("sparsegpt", "0.5", {}, 12.0),
    ("alps", "2:4", {"steps": 20}, 12.0),
)  # method, sparsity, options, seconds that it needs
_LAST: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("wanda", "0.5", {}, 3.0),
    ("alps", "0.5", {"steps": 20}, 12.0),
)
_GRADIENT_WINDOWS = 4


def run(record: Recorder) -> None:
    """Prune with every method, then time the stages."""
    sizes = llama_sizes(dry=record.dry, layers=BLOCKS)
    windows, length = (4, 32) if record.dry else (128, 2048)
    tokens = random_windows(windows, length, vocabulary=sizes["vocab_size"])
    model = llama(sizes, record.device, torch.bfloat16)
    weights = {linear.name: linear.stored.clone() for linear in find_linears(model)}
    with record.step("warm-up"):  # libraries are loaded here, not in the first figure
        _prune(model, tokens[:2], METHODS.make("sparsegpt", {}), Sparsity.parse("2:4"), None)
    _restore(model, weights)
    _methods(record, model, weights, tokens, _FIRST)
    with record.step("gblm 2:4", need=8) as ready:
        if ready:
            _gblm(record, model, tokens)
    _restore(model, weights)
    _stages(record, sizes)
    _methods(record, model, weights, tokens, _LAST)


def _methods(
    record: Recorder, model: Any, weights: dict[str, Tensor], tokens: Tensor, runs: Sequence[Any]
) -> None:
    for method, sparsity, options, need in runs:
        if record.dry and options:
            options = {"steps": 2}
        with record.step(f"{method} {sparsity}", need=need) as ready:
            if ready:
                _method(record, model, tokens, method, sparsity, options)
        _restore(model, weights)


def _restore(model: Any, weights: dict[str, Tensor]) -> None:
    for linear in find_linears(model):
        linear.stored.copy_(weights[linear.name])


def _method(
    record: Recorder, model: Any, tokens: Tensor, method: str, sparsity: str,
    options: dict[str, Any], *, inputs: PrunerInputs | None = None, **more: Any,
) -> None:  # fmt: skip
    """Prune the model, and write the seconds of its blocks and of all 32."""
    pruner, target = METHODS.make(method, options), Sparsity.parse(sparsity)

    seconds = seconds_of(lambda: _prune(model, tokens, pruner, target, inputs), record.device)
    values: dict[str, Any] = {"seconds": seconds, "of_all_blocks": seconds * OF_BLOCKS / BLOCKS}
    values = dict.fromkeys(values) if record.dry else values
    record.add(
        "pruning", method=method, sparsity=sparsity, options=options, blocks=BLOCKS,
        windows=list(tokens.shape), **values, **more,
    )  # fmt: skip


def _prune(
    model: Any, tokens: Tensor, pruner: Any, target: Sparsity, inputs: PrunerInputs | None
) -> None:
    walker = BlockWalker(model, token_ids=tokens, within_block="joint", inputs=inputs)
    pruner.prune(walker, {linear.name: target for linear in walker.linears})


def _gblm(record: Recorder, model: Any, tokens: Tensor) -> None:
    """Gradients of a few windows, in a cache of their own, and the pruning with them."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PRUNEBENCH_CACHE"] = folder
        windows = tokens[:_GRADIENT_WINDOWS]
        norms: list[Any] = []
        seconds = seconds_of(
            lambda: norms.append(gradient_norms(model, windows, norm="l1")), record.device
        )
        record.add(
            "stage", stage=f"gradients of {len(windows)} windows, with writing them",
            seconds=None if record.dry else seconds,
        )  # fmt: skip
        inputs = PrunerInputs(gradients=norms[0])
        _method(record, model, tokens, "gblm", "2:4", {}, inputs=inputs, gradients=len(windows))


def _stages(record: Recorder, sizes: dict[str, int]) -> None:
    """Time what SparseGPT, ALPS and the others consist of, each at both widths of a block."""
    device, wide, inner = record.device, sizes["hidden_size"], sizes["intermediate_size"]
    count = 64 if record.dry else 16384

    def stage(name: str, work: Any, *, repeats: int = 3) -> None:
        with record.step(name, need=2) as ready:
            if ready:
                seconds = seconds_of(work, device, repeats=repeats)
                record.add("stage", stage=name, seconds=None if record.dry else seconds)

    half, pattern = Sparsity.parse("0.5"), Sparsity.parse("2:4")
    for width, outputs in ((wide, inner), (inner, wide)):
        rows = torch.randn(count, width, device=device, dtype=torch.bfloat16)
        sums = StatsAccumulator(hessian=True)
        stage(f"Gram matrix of {count} x {width}", lambda s=sums, r=rows: s.add(r))
        squares = StatsAccumulator()
        stage(f"squares of {count} x {width}", lambda s=squares, r=rows: s.add(r))
        sums = StatsAccumulator(hessian=True)
        sums.add(torch.randn(2 * width, width, device=device))
        stats: InputStats = sums.result(samples=4, width=width, device=device)
        stage(f"Cholesky factor of {width}", lambda s=stats: factorize(s, damping=0.01, name="x"))
        weight = torch.randn(outputs, width, device=device)
        for sparsity in (half, pattern):
            what = f"SparseGPT's factor and columns, {outputs} x {width}, {sparsity}"
            stage(what, lambda w=weight, s=stats, p=sparsity: _solve(w, s, p), repeats=1)
            name = f"mask of {outputs} x {width}, {sparsity}"
            stage(f"{name}, in rows", lambda w=weight, p=sparsity: keep_rows(w.abs(), p))
        stage(f"mask of {outputs} x {width}, 0.5, in the matrix", lambda w=weight: _whole(w, half))
        del rows, weight, stats, sums, squares


def _solve(weight: Tensor, stats: InputStats, sparsity: Sparsity) -> Any:
    return SparseGPT().solve([weight], stats, [sparsity], ["x"])


def _whole(weight: Tensor, sparsity: Sparsity) -> Tensor:
    return keep_matrix(weight.abs(), sparsity)
