"""Benchmark a checkpoint: quality from its result, bytes computed, speed measured on a GPU.

Speed is measured on CUDA only: first every distinct layer (which also updates the policy's choice
of backends), then the whole model, masked dense against packed, interleaved.
"""

from __future__ import annotations

import dataclasses
import gc
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunebench.bench.environment import clocks, environment
from prunebench.bench.layers import NOT_MEASURED, LayerBench, LayerResult, autotuned_dense
from prunebench.bench.model import (
    CONTEXTS,
    DECODE_BATCHES,
    PREFILL,
    ModelResult,
    measure_decode,
    measure_prefill,
)
from prunebench.bench.shapes import SHAPES, TOKENS, LayerShape
from prunebench.bench.timing import clock_for
from prunebench.checkpoints.packed24 import dense_tensors, unpacked
from prunebench.checkpoints.save import RESULT_NAME
from prunebench.checkpoints.sizes import computed_storage
from prunebench.errors import IncompatibleData, MissingResource, PrunebenchError
from prunebench.models.device import make_current
from prunebench.models.linears import find_linears
from prunebench.models.load import load_config, load_model, skeleton
from prunebench.models.source import LocalModel, ModelSource
from prunebench.progress import Progress
from prunebench.results.bench_schema import Bench, QualityBlock, RatioBlock
from prunebench.results.schema import Result
from prunebench.results.store import Damaged, ResultStore, read_copy, read_result
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


@dataclass
class _Speed:
    layers: list[LayerResult] = field(default_factory=list)
    cases: list[ModelResult] = field(default_factory=list)
    resident_bytes: int | None = None
    reason: str = NOT_MEASURED


def find_checkpoint(name: str, store: ResultStore) -> tuple[Path, Result | None]:
    """Return the folder of a checkpoint or of a run's saved model, and its result.

    Args:
        name: A folder, or the id of a run.
        store: Where to look up the id.

    Raises:
        MissingResource: There is no such folder, or the run's weights were not saved here.
        IncompatibleData: The run's result is damaged.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        copy = read_copy(path / RESULT_NAME) if (path / RESULT_NAME).is_file() else None
        return path, copy if isinstance(copy, Result) else None
    if "/" in name and not path.is_file():
        raise MissingResource(
            f"there is no folder {name}", fix="name one that prunebench run --save-model wrote"
        )
    result = read_result(store.find(name))
    if isinstance(result, Damaged):
        raise IncompatibleData(f"{name} is not a result", where=result.reason)
    saved = _saved_model(result)
    if saved is None or not saved.is_dir():
        raise MissingResource(
            f"the weights of {result.id} are not here",
            where="only the folder that run --save-model wrote can be benched",
            fix=f"make them: {result.command}" + ("" if saved else " --save-model DIR"),
        )
    return saved, result


def _saved_model(result: Result) -> Path | None:
    """Return the value of --save-model in the result's command line, if it was given."""
    words = [part for word in shlex.split(result.command) for part in word.split("=", 1)]
    pairs = zip(words, words[1:], strict=False)
    return next((Path(value) for name, value in pairs if name == "--save-model"), None)


def bench(setup: BenchSetup) -> Bench:
    """Return quality, bytes and speed of a checkpoint.

    Raises:
        IncompatibleData: The checkpoint is damaged, or on a GPU no layer of it is 2:4.
    """
    load_config(setup.folder)
    make_current(setup.device)
    tensors = list(dense_tensors(setup.folder).values())
    with setup.progress.stage("bytes", detail=f"{len(tensors)} tensors"):
        storage = computed_storage(tensors)
    # Before and after: a GPU that was throttled in between shows in the difference.
    before = clocks(setup.device)
    speed = _measure(setup) if setup.device.type == "cuda" else _Speed()
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
        | {"clocks_before": before, "clocks_after": clocks(setup.device)},
    )  # fmt: skip


def explain_checkpoint(setup: BenchSetup) -> list[Explained]:
    """Return the backend of every layer by number of tokens, with the reasons.

    Raises:
        IncompatibleData: No layer is 2:4.
    """
    make_current(setup.device)
    _, conversion = _packed_model(setup, Policy.load(setup.device, forced=setup.backend))
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
    speed = _Speed(reason="measured")
    speed.layers = measure_layers(_shapes(setup), policy, setup.progress)
    policy.save()
    packed, conversion = _packed_model(setup, policy)
    speed.resident_bytes = weight_bytes(packed, conversion)
    # Packed first: its dense weights are freed layer by layer before the dense model is loaded.
    models = {"dense": _load(setup), "packed": packed}
    speed.cases = _measure_model(models, setup)
    return speed


def measure_layers(
    shapes: Sequence[LayerShape], policy: Policy, progress: Progress
) -> list[LayerResult]:
    """Measure layers for few and many tokens; the policy stores the speedup of each backend."""
    rows = []
    clock = clock_for(policy.device)
    total = len(shapes) * len(TOKENS)
    with progress.stage("layers", total=total, detail="dense and packed", unit="cells") as advance:
        for shape in shapes:
            layer = LayerBench(
                shape, policy.device, torch.bfloat16, policy, clock, compile_dense=autotuned_dense
            )
            for tokens in TOKENS:
                row = layer.measure(tokens)
                rows.append(row)
                advance(1)
                if row.dense:
                    # The policy compares with the best dense product: autotuned, if that was
                    # faster.
                    rivals = {name: row.seconds[name] for name in backends() if name in row.seconds}
                    best = {"dense": row.seconds[row.dense], **rivals}
                    size = (shape.rows, shape.width)
                    policy.remember(size, torch.bfloat16, bucket_of(tokens), best)
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
    cases = [
        ("prefill", batch, prompt, partial(measure_prefill, models, batch=batch, prompt=prompt))
        for batch, prompt in PREFILL
    ]
    cases += [
        ("decode", batch, context, partial(measure_decode, models, batch=batch, context=context))
        for batch in DECODE_BATCHES
        for context in CONTEXTS
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


def _load(setup: BenchSetup) -> nn.Module:
    source = ModelSource(setup.folder.resolve().name, "folder", str(setup.folder))
    revision = setup.result.model.evaluated_sha256 if setup.result and setup.result.model else ""
    # Without a hash, the newest change in the folder tells one state of it from another.
    revision = revision or str(max(p.stat().st_mtime_ns for p in setup.folder.iterdir()))
    local = unpacked(LocalModel(source, setup.folder, revision), setup.progress)
    with setup.progress.stage("load", detail=f"{setup.folder} in bfloat16 on {setup.device}"):
        return load_model(local.path, dtype=torch.bfloat16, device=setup.device)


def _packed_model(setup: BenchSetup, policy: Policy) -> tuple[nn.Module, Conversion]:
    model = _load(setup)
    with setup.progress.stage("pack", detail="linears, one after the other"):
        return model, convert(model, find_linears(model), policy=policy)


def weight_bytes(model: Any, conversion: Conversion) -> int:
    """Return the bytes of all weights of a converted model."""
    # Packed weights are no parameters: they are counted by the conversion.
    rest = sum(parameter.nbytes for parameter in model.parameters())
    return int(rest + conversion.stored_bytes)
