"""CPU = GPU for every CUDA path: packing, kernels, noise, learned masks, pruning, losses, scores.

Each row is a check with what was measured, what is allowed, and whether it holds. Bits must be
equal where both sides do the same arithmetic; masks may differ where rounding decides a tie.
"""

from __future__ import annotations

import atexit
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_acceptance.measure import difference, llama, random_windows
from benchmarks.gpu_acceptance.parts.machine import sanitizer
from benchmarks.gpu_acceptance.record import Recorder
from prunebench.bench.layers import random_packed
from prunebench.evaluate.perplexity import window_losses
from prunebench.models.gradients import gradient_norms
from prunebench.models.linears import find_linears
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.pruners.maskllm import dispatch, noise
from prunebench.pruners.maskllm.candidates import candidates
from prunebench.pruners.maskllm.optimize import Optimizer
from prunebench.pruners.maskllm.relaxation import LayerLogits, Relaxation, WeightGradient
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.backends.triton import MOST_TOKENS, TiledLayout
from prunebench.sparse24.layer import convert
from prunebench.sparse24.layouts import FileLayout
from prunebench.sparse24.packed import pack24, unpack24
from prunebench.sparse24.policy import Policy
from prunebench.sparsity import Sparsity

CPU = torch.device("cpu")
METHODS_CHECKED = ("magnitude", "wanda", "ria", "sparsegpt", "alps", "gblm")
_SAME_BITS = {"magnitude": 1.0, "wanda": 0.9999, "ria": 0.9999, "gblm": 0.999}
_SAME_OF_SOLVERS = 0.95  # their later columns depend on the rounding of the earlier ones
_LOSS = 0.01  # the loss of the layers, which does not depend on which of two ties goes
_DECODE = """
import torch
from prunebench.bench.layers import random_packed
from prunebench.sparse24.backends.triton import TiledLayout, TritonProduct
cuda = torch.device("cuda", 0)
packed = random_packed((264, 1280), dtype=torch.bfloat16, device=cuda, seed=0)
x = torch.randn(3, 1280, device=cuda, dtype=torch.bfloat16)
TritonProduct(TiledLayout.of(packed)).run(x, None)
torch.cuda.synchronize()
"""


def run(record: Recorder) -> None:
    """Check every path, the fast ones first."""
    with record.step("packed"):
        _packed(record)
    with record.step("products"):
        _products(record)
    with record.step("noise"):
        _noise(record)
    with record.step("kernels of maskllm"):
        _maskllm_kernels(record)
    sizes = _sizes(dry=record.dry)
    windows = random_windows(8, 32 if record.dry else 256, vocabulary=sizes["vocab_size"])
    dense = llama(sizes, CPU, torch.float32)
    with record.step("losses", need=3) as ready:
        if ready:
            _losses(record, dense, windows)
    for method in METHODS_CHECKED:
        for sparsity in ("2:4", "0.5"):
            with record.step(f"{method} {sparsity}", need=3) as ready:
                if ready:
                    _masks(record, dense, windows, method, sparsity)
    with record.step("training of masks", need=3) as ready:
        if ready:
            _training(record, dense, windows)
    with record.step("packed scores", need=3) as ready:
        if ready:
            _packed_scores(record, dense, windows)
    if not record.dry:
        with record.step("compute-sanitizer", need=10) as ready:
            if ready:
                _sanitized(record)


def _check(record: Recorder, what: str, value: float, allowed: float, goal: str) -> None:
    holds = value <= allowed if goal == "at most" else value >= allowed
    record.add("check", what=what, value=value, goal=goal, allowed=allowed, holds=holds)


def _same(record: Recorder, what: str, actual: Tensor, expected: Tensor) -> None:
    """Write whether two tensors are equal bit for bit, as the share that is."""
    share = float((actual.cpu() == expected.cpu()).double().mean())
    _check(record, f"{what}, share of equal elements", share, 1.0, "at least")


def _sizes(*, dry: bool) -> dict[str, int]:
    wide = 64 if dry else 512
    return {
        "hidden_size": wide, "intermediate_size": 2 * wide + 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "max_position_embeddings": 512,
    }  # fmt: skip


# ---------------------------------------------------------------- 2:4


def _packed(record: Recorder) -> None:
    """Pack, unpack and tile on both devices."""
    shape = (40, 768) if record.dry else (1000, 4352)  # no multiple of a tile
    here = random_packed(shape, dtype=torch.bfloat16, device=CPU, seed=0)
    dense = unpack24(here)
    there = pack24(dense.to(record.device))
    _same(record, "values that are packed", there.values, here.values)
    _same(record, "codes that are packed", there.codes, here.codes)
    _same(record, "weights that are unpacked", unpack24(there), dense)
    tiled, expected = TiledLayout.of(there), TiledLayout.of(here)
    _same(record, "words of tiles", tiled.words, expected.words)
    _same(record, "places of tiles", tiled.meta, expected.meta)
    out = torch.empty_like(dense, device=record.device)
    tiled.write_dense(out)
    _same(record, "weights that are unpacked from tiles", out, dense)


def _products(record: Recorder) -> None:
    """Every backend against float64 on the CPU; it may err twice as much as the dense product."""
    policy = Policy(record.device, speed=True)
    for shape in ((64, 256), (96, 512)) if record.dry else ((4096, 4096), (1000, 4352)):
        packed = random_packed(shape, dtype=torch.bfloat16, device=CPU, seed=1)
        dense, there = unpack24(packed), packed_on(packed, record.device)
        for tokens in (1, 100) if record.dry else (1, 2, 3, MOST_TOKENS, 8, 100):
            x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
            x = x.to(torch.bfloat16)
            exact = x.double() @ dense.double().t()
            x = x.to(record.device)
            plain = torch.nn.functional.linear(x, unpack24(there))
            allowed = 2 * difference(plain, exact) + 1e-6
            for name, verdict in policy.verdicts(shape, torch.bfloat16, tokens).items():
                if verdict.ok:
                    backend = backends()[name]
                    form: Any = backend.layout(there) or FileLayout(there)
                    error = difference(backend.build(form).run(x, None), exact)
                    what = f"error of {name}, {shape[0]} x {shape[1]}, {tokens} tokens"
                    _check(record, what, error, allowed, "at most")


def packed_on(packed: Any, device: torch.device) -> Any:
    """Return a packed matrix on a device."""
    return type(packed)(packed.values.to(device), packed.codes.to(device))


def _packed_scores(record: Recorder, dense: Any, windows: Tensor) -> None:
    """Losses of a packed model against those of the same weights, dense, with each backend."""
    model = copy.deepcopy(dense).to(torch.bfloat16).to(record.device)
    _prune(model, windows, "magnitude", "2:4")
    expected = torch.tensor(window_losses(model, windows))
    for name, backend in backends().items():
        if backend.available(record.device).ok:
            policy = Policy(record.device, forced=name)
            conversion = convert(model, find_linears(model), policy=policy)
            actual = torch.tensor(window_losses(model, windows))
            conversion.restore()
            what = f"losses of the packed model, {name}"
            _check(record, what, difference(actual, expected), 2e-3, "at most")


# ---------------------------------------------------------------- learned masks


def _noise(record: Recorder) -> None:
    """Philox: torch on both devices, and the kernels."""
    key = {"seed": 3141592653, "step": 2718281828, "layer": 57}
    index = torch.arange((1 << 32) - 100, (1 << 32) + 100)
    expected = noise.uniforms(index, 13, **key)
    actual = noise.uniforms(index.to(record.device), 13, **key)
    _same(record, "noise of torch", actual, expected)
    if record.device.type == "cuda":
        why = dispatch.kernel_mismatch(record.device)
        _check(record, f"noise of the kernels {why}".strip(), float(not why), 1.0, "at least")


def _maskllm_kernels(record: Recorder) -> None:
    """Soft weights and an optimizer step: what the device runs against plain torch on the CPU."""
    generator = torch.Generator().manual_seed(0)
    table, rows, width = candidates(2, 4), 130, 45
    logits = torch.randn(len(table), rows * width, generator=generator)
    weight = torch.randn(rows, 4 * width, generator=generator)
    slope = WeightGradient(
        torch.randn(rows, 4 * width, generator=generator),
        torch.rand(rows, generator=generator), torch.rand(4 * width, generator=generator),
    )  # fmt: skip
    how = Relaxation(seed=11, step=3, temperature=0.8, scale=2.0, reward=1e-4, curvature=0.5)
    for kind in ("adamw", "momentum", "mirror"):
        optimizer = Optimizer(kind)
        results = []
        for device in (CPU, record.device):
            layer = LayerLogits(7, logits.clone().to(device), table.to(device), width, first=900)
            optimizer.prepare(layer)
            moved = WeightGradient(*(getattr(slope, f.name).to(device) for f in fields(slope)))
            soft = torch.empty_like(weight, device=device)
            dispatch.soften(layer, weight.to(device), how, soft)
            directions = optimizer.directions(layer, weight.to(device), moved, how)
            optimizer.step(layer, directions, how, rate=0.01, unit=1.0, count=1)
            results.append((soft, layer.logits))
        (soft, after), (expected, learned) = results[1], results[0]
        _check(record, f"soft weights before {kind}", difference(soft, expected), 1e-5, "at most")
        step = difference(after.cpu() - logits, learned - logits)
        _check(record, f"a step of {kind}", step, 1e-3, "at most")


def _training(record: Recorder, dense: Any, windows: Tensor) -> None:
    """The loss curve of five steps of MaskLLM on both devices."""
    curves = [_curve(copy.deepcopy(dense).to(device), windows) for device in (CPU, record.device)]
    error = difference(torch.tensor(curves[1]), torch.tensor(curves[0]))
    _check(record, "losses of five steps of MaskLLM", error, 1e-3, "at most")


def _curve(model: Any, windows: Tensor) -> list[float]:
    from prunebench.models.replay import plain_inference
    from prunebench.pruners.maskllm.method import MaskLLM
    from prunebench.training.shards import Shards

    length = windows.shape[1]
    method = MaskLLM(preset="laptop", prior="scratch", batch=4, train_seqlen=length).filled()
    learner = method.learner(BlockWalker(model), None, candidates(2, 4), Shards())
    train = windows.to(next(model.parameters()).device)
    with plain_inference(model), torch.enable_grad():
        learner._backward.prepare(train[:1, :32])
        return [learner._step(step, train) for step in range(5)]


# ---------------------------------------------------------------- pruning and losses


def _losses(record: Recorder, dense: Any, windows: Tensor) -> None:
    """Losses of windows, and norms of gradients, on both devices."""
    there = copy.deepcopy(dense).to(record.device)
    actual, expected = (torch.tensor(window_losses(each, windows)) for each in (there, dense))
    _check(record, "losses of windows", difference(actual, expected), 1e-5, "at most")
    norms = [_gradients(each, windows) for each in (dense, there)]
    name = find_linears(dense)[0].name
    error = difference(norms[1].read(name), norms[0].read(name))
    _check(record, "norms of gradients", error, 1e-3, "at most")


def _gradients(model: Any, windows: Tensor) -> Any:
    """Return gradient norms that are computed, not read from the cache of another device."""
    folder = tempfile.mkdtemp(prefix="gpu-acceptance-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["PRUNEBENCH_CACHE"] = folder
    return gradient_norms(model, windows[:4], norm="l1")


def _prune(model: Any, windows: Tensor, method: str, sparsity: str) -> Any:
    pruner = METHODS.make(method, {"steps": 20} if method == "alps" else {})
    gradients = _gradients(model, windows) if method == "gblm" else None
    walker = BlockWalker(
        model, token_ids=windows, within_block="joint", inputs=PrunerInputs(gradients=gradients)
    )
    target = Sparsity.parse(sparsity)
    return pruner.prune(walker, {linear.name: target for linear in walker.linears})


def _masks(record: Recorder, dense: Any, windows: Tensor, method: str, sparsity: str) -> None:
    """The masks and the losses of a method on both devices."""
    models = [copy.deepcopy(dense), copy.deepcopy(dense).to(record.device)]
    reports = [_prune(model, windows, method, sparsity) for model in models]
    pairs = list(_zeros(*models))
    same = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    allowed = _SAME_BITS.get(method, _SAME_OF_SOLVERS)
    _check(record, f"masks of {method} {sparsity}, share of equal bits", same, allowed, "at least")
    if reports[0].losses:
        losses = [sum(report.losses.values()) for report in reports]
        error = abs(losses[1] / losses[0] - 1)
        _check(record, f"loss of {method} {sparsity}, relative", error, _LOSS, "at most")


def _zeros(first: Any, second: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for a, b in zip(find_linears(first), find_linears(second), strict=True):
        yield a.stored == 0, b.stored.cpu() == 0


def _sanitized(record: Recorder) -> None:
    """One launch of the decode kernel under compute-sanitizer."""
    if shutil.which("compute-sanitizer") is None:
        record.add("skipped", step="compute-sanitizer", why="it is not installed")
        return
    process = sanitizer(_DECODE, record.left - 2)
    text = (process.stdout + process.stderr).strip().splitlines()
    if process.returncode not in (0, 9):
        why = text[-1][:200] if text else f"status {process.returncode}"
        record.add("skipped", step="compute-sanitizer", why=why)
        return
    what = "accesses outside of memory in the decode kernel"
    _check(record, what, float(process.returncode == 9), 0.0, "at most")
