"""Benchmark a checkpoint: quality from its result, bytes computed, speed measured.

Speed is measured on CUDA, and on a CPU that has a compiler for our kernels: first every distinct
layer (which also updates the policy's choice of backends), then the whole model, masked dense
against packed, interleaved.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunebench.bench.cpu_dense import FLOAT32, OURS, Dense16Linear
from prunebench.bench.environment import clocks, environment
from prunebench.bench.layers import NOT_MEASURED, LayerBench, LayerResult, autotuned_dense
from prunebench.bench.model import (
    CONTEXTS,
    CPU_CONTEXTS,
    CPU_DECODE_BATCHES,
    CPU_PREFILL,
    DECODE_BATCHES,
    PREFILL,
    ModelResult,
    measure_decode,
    measure_prefill,
)
from prunebench.bench.shapes import CPU_TOKENS, SHAPES, TOKENS, LayerShape
from prunebench.bench.timing import clock_for
from prunebench.checkpoints.find import local_checkpoint, require_scored
from prunebench.checkpoints.packed24 import dense_tensors, unpacked
from prunebench.checkpoints.sizes import computed_storage
from prunebench.errors import PrunebenchError
from prunebench.models.device import make_current
from prunebench.models.linears import find_linears
from prunebench.models.load import load_config, load_model, skeleton
from prunebench.models.stored_dtype import StoredDtype
from prunebench.models.stored_model import stored_model
from prunebench.progress import Progress
from prunebench.results.bench_schema import Bench, QualityBlock, RatioBlock
from prunebench.results.schema import Result
from prunebench.sparse24.backends.cpu import CpuBackend
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.buckets import bucket_of
from prunebench.sparse24.layer import Conversion, Explained, convert, explain
from prunebench.sparse24.policy import Policy


@dataclass(frozen=True)
class BenchSetup:
    """The arguments of a benchmark.

    Attributes:
        folder: The checkpoint.
        result: The result of its run, if known.
        device: Where to measure.
        backend: A forced backend, or None.
        speed: Whether layers may store a second copy of the weight for many tokens.
        grid: Whether to measure the layer shapes of the papers' large models too.
        command: The command line, stored in the benchmark.
        progress: Shows the stages.
    """

    folder: Path
    result: Result | None
    device: torch.device
    backend: str | None
    speed: bool
    grid: bool
    command: str
    progress: Progress

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which speed is measured: float16 if most block matrices are, else bfloat16."""
        is_half = StoredDtype.of(self.folder).dtype == "float16"
        return torch.float16 if is_half else torch.bfloat16


@dataclass
class _Speed:
    layers: list[LayerResult] = field(default_factory=list)
    cases: list[ModelResult] = field(default_factory=list)
    resident_bytes: int | None = None
    reason: str = NOT_MEASURED


def bench(setup: BenchSetup) -> Bench:
    """Return quality, bytes and speed of a checkpoint.

    Raises:
        IncompatibleData: The checkpoint is damaged or was changed since it was scored, or on a GPU
            no layer of it is 2:4.
    """
    config = load_config(setup.folder)
    make_current(setup.device)
    tensors = dense_tensors(setup.folder)
    with setup.progress.stage("bytes", detail=f"{len(tensors)} tensors"):
        storage = computed_storage(list(tensors.values()))
        if setup.result is not None:
            # the quality is that of the result
            stored = stored_model(skeleton(config), tensors)
            require_scored(setup.folder, stored, setup.result)
    # Before and after: a GPU that was throttled in between shows in the difference.
    before = clocks(setup.device)
    reason = _why_not_measured(setup, storage.packed24_bytes)
    speed = _Speed(reason=reason) if reason else _measure(setup)
    result = setup.result
    return Bench(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=setup.command,
        checkpoint=str(setup.folder),
        result_id=result.id if result else None,
        vs="dense",
        quality=[
            QualityBlock(
                metric=score.metric, protocol=score.protocol, value=score.value,
                dense_value=score.dense_value,
            )
            for score in (result.scores if result else [])
        ],
        storage=storage,
        speed=speed.reason,
        decode=_ratio_of(speed.cases, "decode", batch=1, context=128),
        prefill=_ratio_of(speed.cases, "prefill", batch=1, context=2048),
        resident_bytes=speed.resident_bytes,
        layers=[layer.to_dict() for layer in speed.layers],
        cases=[dataclasses.asdict(case) for case in speed.cases],
        environment=environment(setup.device)
        | {"dtype": str(setup.dtype).removeprefix("torch.")}
        | {"clocks_before": before, "clocks_after": clocks(setup.device)},
    )  # fmt: skip


def _why_not_measured(setup: BenchSetup, packed24_bytes: int | None) -> str:
    """Return why speed is not measured on this device; "" if it is."""
    if setup.device.type == "cuda":
        return ""
    if setup.device.type != "cpu":
        return NOT_MEASURED
    verdict = backends()[CpuBackend.name].available(setup.device)
    if not verdict.ok:
        return f"not measured (no CPU kernel: {verdict.reason})"
    return "" if packed24_bytes is not None else "not measured (no matrix is 2:4)"


def explain_checkpoint(setup: BenchSetup) -> list[Explained]:
    """Return the backend of every layer by number of tokens, with the reasons.

    Raises:
        IncompatibleData: No layer is 2:4.
    """
    make_current(setup.device)
    policy = Policy.load(setup.device, forced=setup.backend)
    _, conversion = _packed_model(setup, policy)
    return explain(conversion, TOKENS)


def _ratio_of(
    cases: Sequence[ModelResult], case: str, *, batch: int, context: int
) -> RatioBlock | None:
    for result in cases:
        if (result.case, result.batch, result.context) == (case, batch, context) and result.ratio:
            return RatioBlock(**dataclasses.asdict(result.ratio))
    return None


def _measure(setup: BenchSetup) -> _Speed:
    """Measure layers, then the model."""
    policy = Policy.load(setup.device, forced=setup.backend, speed=setup.speed)
    speed = _Speed()
    speed.layers = measure_layers(_shapes(setup), policy, setup.progress, dtype=setup.dtype)
    policy.save()
    speed.reason = _no_gain(setup, policy)
    if speed.reason != "measured":
        return speed
    packed, conversion = _packed_model(setup, policy)
    if not conversion.layers:  # those that would be faster are not 2:4
        speed.reason = f"{next(iter(conversion.dense.values()))}: no layer is faster packed"
        return speed
    speed.resident_bytes = weight_bytes(packed, conversion)
    # Packed first: its dense weights are freed layer by layer before the dense model is loaded.
    models = {"dense": _load(setup), "packed": packed}
    if setup.device.type == "cpu":
        models |= _cpu_models(models["dense"], setup)
    speed.cases = _measure_model(models, setup)
    return speed


def _no_gain(setup: BenchSetup, policy: Policy) -> str:
    """Return `measured`; or, if all layers would stay dense for lack of a gain, that."""
    linears = find_linears(skeleton(load_config(setup.folder)))
    sizes = {(linear.out_features, linear.in_features) for linear in linears}
    reasons = [policy.gains_nothing(size, setup.dtype) for size in sizes]
    return "measured" if not all(reasons) else f"{max(reasons)}: no layer is faster packed"


def measure_layers(
    shapes: Sequence[LayerShape], policy: Policy, progress: Progress, *, dtype: torch.dtype
) -> list[LayerResult]:
    """Measure layers for few and many tokens; the policy stores the speedup of each backend."""
    rows = []
    clock = clock_for(policy.device)
    on_cpu = policy.device.type == "cpu"
    counts = CPU_TOKENS if on_cpu else TOKENS
    total = len(shapes) * len(counts)
    with progress.stage("layers", total=total, detail="dense and packed", unit="cells") as advance:
        for shape in shapes:
            layer = LayerBench(
                shape, policy.device, dtype, policy, clock,
                compile_dense=None if on_cpu else autotuned_dense,
            )  # fmt: skip
            for tokens in counts:
                row = layer.measure(tokens)
                rows.append(row)
                advance(1)
                if row.dense:
                    # The policy compares with the best dense product: autotuned, if that was
                    # faster.
                    rivals = {name: row.seconds[name] for name in backends() if name in row.seconds}
                    best = {"dense": row.seconds[row.dense], **rivals}
                    size = (shape.rows, shape.width)
                    policy.remember(size, dtype, bucket_of(tokens), best)
    return rows


def _shapes(setup: BenchSetup) -> list[LayerShape]:
    """Return the distinct shapes of the model, with the first linear of each as the name."""
    sizes: dict[tuple[int, int], LayerShape] = {}
    for linear in find_linears(skeleton(load_config(setup.folder))):
        size = (linear.out_features, linear.in_features)
        name = linear.name.rpartition(".")[2]
        # Layers of one shape take the same time: each shape is measured once.
        sizes.setdefault(size, LayerShape("this model", name, *size))
    return [*sizes.values(), *(SHAPES if setup.grid else ())]


def _measure_model(models: dict[str, nn.Module], setup: BenchSetup) -> list[ModelResult]:
    clock = clock_for(setup.device)
    rows: list[ModelResult] = []
    on_cpu = setup.device.type == "cpu"
    cases = [
        ("prefill", batch, prompt, partial(measure_prefill, models, batch=batch, prompt=prompt))
        for batch, prompt in (CPU_PREFILL if on_cpu else PREFILL)
    ]
    cases += [
        ("decode", batch, context, partial(measure_decode, models, batch=batch, context=context))
        for batch in (CPU_DECODE_BATCHES if on_cpu else DECODE_BATCHES)
        for context in (CPU_CONTEXTS if on_cpu else CONTEXTS)
    ]
    with setup.progress.stage(
        "model", total=len(cases), detail="in turns", unit="cases"
    ) as advance:
        for case, batch, context, measure in cases:
            rows.append(_guarded(case, batch, context, partial(measure, clock=clock)))
            advance(1)
    return rows


def _guarded(
    case: str, batch: int, context: int, measure: Callable[[], ModelResult]
) -> ModelResult:
    """Measure a case; if it fails (out of memory, context too long) record the reason."""
    try:
        return measure()
    # Errors with a message of their own are not a property of the case: they end the benchmark.
    except PrunebenchError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return ModelResult(case, batch, context, None, None, None, None, None, reason)
    finally:
        # Frees cycles of a failed case (its traceback refers to tensors) before the next one
        # allocates.
        gc.collect()


def _cpu_models(dense: nn.Module, setup: BenchSetup) -> dict[str, nn.Module]:
    """Return further dense models: by our kernel, and in float32 if that fits in memory."""
    from psutil import virtual_memory

    models = {OURS: with_our_kernel(dense)}
    needed = 4 * sum(parameter.numel() for parameter in dense.parameters())
    if needed * 3 // 2 < virtual_memory().available:
        models[FLOAT32] = _load(setup, torch.float32)
    return models


def with_our_kernel(model: nn.Module) -> nn.Module:
    """Return a model that shares the weights of another one, and multiplies by our dense kernel."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    other = copy.deepcopy(model, shared)
    for linear in find_linears(other):
        if isinstance(linear.module, nn.Linear):
            path, _, child = linear.name.rpartition(".")
            setattr(other.get_submodule(path), child, Dense16Linear(linear.module))
    return other


def _load(setup: BenchSetup, dtype: torch.dtype | None = None) -> nn.Module:
    dtype = dtype or setup.dtype
    local = unpacked(local_checkpoint(setup.folder), setup.progress)
    with setup.progress.stage("load", detail=f"{setup.folder} in {dtype} on {setup.device}"):
        return load_model(local.path, dtype=dtype, device=setup.device)


def _packed_model(setup: BenchSetup, policy: Policy) -> tuple[nn.Module, Conversion]:
    model = _load(setup)
    with setup.progress.stage("pack", detail="linears, one after the other"):
        linears = find_linears(model)
        return model, convert(model, linears, policy=policy)


def weight_bytes(model: Any, conversion: Conversion) -> int:
    """Return the bytes of all weights of a converted model."""
    # Packed weights are no parameters: they are counted by the conversion.
    rest = sum(parameter.nbytes for parameter in model.parameters())
    return int(rest + conversion.stored_bytes)
