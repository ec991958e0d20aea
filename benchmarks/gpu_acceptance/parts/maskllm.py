"""A training step of MaskLLM at the shapes of LLaMA-2-7B beside a dense step of the same windows.

A dense step is forward and backward with the gradients of the linears' weights, no optimizer. The
passes over the logits cost the same for any number of windows: their share falls with the batch.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_acceptance.measure import llama, llama_sizes, random_windows, seconds_of
from benchmarks.gpu_acceptance.record import Recorder
from prunebench.models.linears import find_linears
from prunebench.models.replay import plain_inference
from prunebench.models.walker import BlockWalker
from prunebench.pruners.maskllm import dispatch
from prunebench.pruners.maskllm.candidates import candidates
from prunebench.pruners.maskllm.method import MaskLLM
from prunebench.pruners.maskllm.optimize import sum_squares
from prunebench.pruners.maskllm.relaxation import WeightGradient
from prunebench.training.shards import Shards

LAYERS = 8
"""Of 32: enough that the output layer, which is not masked, is a small share of a step."""

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"logit_dtype": "float32", "state_dtype": "bfloat16"},
    "lean": {"logit_dtype": "bfloat16", "state_dtype": "int8"},
}
_WINDOWS = (32, 1)
_ROUNDS = 2


def run(record: Recorder) -> None:
    """Measure the dense step, then each variant for many windows and for one."""
    sizes = llama_sizes(dry=record.dry, layers=LAYERS)
    model = llama(sizes, record.device, torch.bfloat16)
    length = 32 if record.dry else 4096
    train = random_windows(
        2 if record.dry else max(_WINDOWS), length, vocabulary=sizes["vocab_size"]
    )
    train = train.to(record.device)
    counts = (2, 1) if record.dry else _WINDOWS
    dense: dict[int, float] = {}
    for count in counts:
        with record.step(f"dense step of {count}", need=5) as ready:
            if ready:
                dense[count] = _dense(record, model, train[:count])
    for name, options in VARIANTS.items():
        for count in counts:
            with record.step(f"{name}, {count} windows", need=8) as ready:
                if ready and count in dense:
                    _variant(record, model, train[:count], name, options, dense[count])


def _dense(record: Recorder, model: Any, windows: Tensor) -> float:
    linears = find_linears(model)

    def step() -> None:
        for window in windows[:, None]:  # [1, seqlen] each
            model(input_ids=window, labels=window, use_cache=False).loss.backward()

    for linear in linears:
        linear.module.weight.requires_grad_(True)
    seconds = seconds_of(step, record.device, repeats=_ROUNDS)
    for linear in linears:
        linear.module.weight.requires_grad_(False)
        linear.module.weight.grad = None
    record.add("dense step", windows=list(windows.shape), seconds=None if record.dry else seconds)
    return seconds


def _variant(
    record: Recorder, model: Any, windows: Tensor, name: str, options: dict[str, Any], dense: float
) -> None:
    count, length = windows.shape
    method = MaskLLM(preset="paper", prior="scratch", batch=count, train_seqlen=length, **options)
    learner = method.filled().learner(BlockWalker(model), None, candidates(2, 4), Shards())
    losses: list[float] = []
    with plain_inference(model), torch.enable_grad():
        learner._backward.prepare(windows[:1, :128])
        if record.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def step() -> None:
            losses.append(learner._step(len(losses), windows))

        # The first step compiles; it is not counted.
        seconds = seconds_of(step, record.device, repeats=_ROUNDS)
    values: dict[str, Any] = {"seconds": seconds, "of_a_dense_step": seconds / dense}
    values = dict.fromkeys(values) if record.dry else values
    kernels = dispatch.kernels_match_torch(record.device)
    record.add(
        "step", variant=name, windows=[count, length], layers=LAYERS, losses=losses,
        triton_kernels=kernels, memory=_memory(record, model, learner), **values,
    )  # fmt: skip
    if count == 1 or record.dry:
        _passes(record, name, learner)


def _memory(record: Recorder, model: Any, learner: Any) -> dict[str, int]:
    """Return bytes by item; the rest of the peak are activations."""
    layers = learner.layers
    items = {
        "model": sum(parameter.nbytes for parameter in model.parameters()),
        "logits": sum(layer.logits.nbytes for layer in layers.values()),
        "moments": sum(_moments(layer) for layer in layers.values()),
        "gradients": sum(linear.size for linear in layers) * learner._sums._dtype.itemsize,
    }
    if record.device.type == "cuda":
        items["peak"] = torch.cuda.max_memory_allocated()
    return items


def _moments(layer: Any) -> int:
    return sum(moment.values.nbytes + moment.scales.nbytes for moment in layer.state.values())


def _passes(record: Recorder, name: str, learner: Any) -> None:
    """Bandwidth of the passes over all logits: what is read and written, by the time."""
    how = learner.schedule.relaxation(1, seed=0, draw=1)
    optimizer, layers, kind = learner.optimizer, learner.layers, learner._sums._dtype

    def slopes(linear: Any) -> WeightGradient:
        rows, columns = (
            torch.zeros(size, device=record.device)
            for size in (linear.out_features, linear.in_features)
        )
        gradient = torch.zeros(linear.stored.shape, dtype=kind, device=record.device)
        return WeightGradient(gradient, rows, columns)

    def soften() -> None:
        for linear, layer in layers.items():
            dispatch.soften(layer, linear.stored, how, torch.empty_like(linear.stored))

    def squares() -> None:
        for linear, layer in layers.items():
            sum_squares(optimizer.directions(layer, linear.stored, slopes(linear), how))

    def update() -> None:
        for linear, layer in layers.items():
            ascent = optimizer.directions(layer, linear.stored, slopes(linear), how)
            optimizer.step(layer, ascent, how, rate=0.0, unit=1.0, count=1)

    logits = sum(layer.logits.nbytes for layer in layers.values())
    moments = sum(_moments(layer) for layer in layers.values())
    weights = sum(linear.stored.nbytes for linear in layers)
    slope = sum(linear.size for linear in layers) * kind.itemsize
    for title, work, moved in (
        ("soften", soften, logits + 2 * weights),
        ("squares", squares, logits + weights + 2 * slope),  # the slope is also made
        ("update", update, 2 * logits + 2 * moments + weights + 2 * slope),
    ):
        times = [seconds_of(work, record.device, repeats=2)]
        rate = None if record.dry else moved / statistics.median(times)
        record.add("pass", variant=name, name=title, bytes_per_second=rate)
