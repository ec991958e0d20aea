"""What a checkpoint buys: its quality from its result, bytes computed, speed measured on a GPU.

Speed is measured where there is a CUDA device: first every distinct layer (which also decides and
remembers the backends), then the whole model, masked dense against packed, in turns.
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
from prunebench.models.linears import find_linears
from prunebench.models.load import load_config, load_model, skeleton
from prunebench.models.source import LocalModel, ModelSource
from prunebench.progress import Progress
from prunebench.results.bench_schema import Bench, QualityBlock, RatioBlock
from prunebench.results.schema import Result
from prunebench.results.store import Damaged, ResultStore, read_copy, read_result
from prunebench.sparse24.buckets import bucket_of
from prunebench.sparse24.layer import Conversion, Explained, convert, explain
from prunebench.sparse24.policy import Policy


@dataclass(frozen=True)
class BenchSetup:
    """What is benched, and how.

    Attributes:
        folder: The checkpoint.
        result: Of its run, if it is known.
        device: Where.
        backend: A backend that is forced, or None.
        speed: Whether layers may keep a second form for many tokens.
        grid: Whether the layers of the papers' large models are measured too.
        command: The command line, for the record.
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

    Raises:
        MissingResource: There is neither such a folder nor the weights of such a run.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        copy = read_copy(path / RESULT_NAME) if (path / RESULT_NAME).is_file() else None
        return path, copy if isinstance(copy, Result) else None
    if "/" in name and not path.is_file():
        raise MissingResource(
            f"there is no folder {name}", fix="name one that prunebench run --save-model wrote"
        )
    found = read_result(store.find(name))
    if isinstance(found, Damaged):
        raise IncompatibleData(f"{name} is no result", where=found.reason)
    saved = _saved_model(found)
    if saved is None or not saved.is_dir():
        raise MissingResource(
            f"the weights of {found.id} are not here",
            where="only the folder that run --save-model wrote can be benched",
            fix=f"make them: {found.command}" + ("" if saved else " --save-model DIR"),
        )
    return saved, found


def _saved_model(result: Result) -> Path | None:
    words = [part for word in shlex.split(result.command) for part in word.split("=", 1)]
    pairs = zip(words, words[1:], strict=False)
    return next((Path(value) for name, value in pairs if name == "--save-model"), None)


def bench(setup: BenchSetup) -> Bench:
    """Return quality, bytes and speed of a checkpoint.

    Raises:
        IncompatibleData: The checkpoint is damaged, or on a GPU no layer of it is 2:4.
    """
    load_config(setup.folder)
    tensors = list(dense_tensors(setup.folder).values())
    with setup.progress.stage("bytes", detail=f"{len(tensors)} tensors"):
        storage = computed_storage(tensors)
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
                metric=one.metric, protocol=one.protocol, value=one.value,
                dense_value=one.dense_value,
            )
            for one in (result.scores if result else [])
        ],
        storage=storage,
        speed=speed.reason,
        decode=_ratio_of(speed.cases, "decode", batch=1, context=128),
        prefill=_ratio_of(speed.cases, "prefill", batch=1, context=2048),
        resident_bytes=speed.resident_bytes,
        layers=[one.to_dict() for one in speed.layers],
        cases=[dataclasses.asdict(one) for one in speed.cases],
        environment=environment(setup.device)
        | {"clocks_before": before, "clocks_after": clocks(setup.device)},
    )  # fmt: skip


def explain_checkpoint(setup: BenchSetup) -> list[Explained]:
    """Return which backend would run every layer, why, and why not the others.

    Raises:
        IncompatibleData: No layer is 2:4.
    """
    _, conversion = _packed_model(setup, Policy.load(setup.device, forced=setup.backend))
    return explain(conversion, TOKENS)


def _ratio_of(
    cases: Sequence[ModelResult], case: str, *, batch: int, context: int
) -> RatioBlock | None:
    for one in cases:
        if (one.case, one.batch, one.context) == (case, batch, context) and one.ratio:
            return RatioBlock(**dataclasses.asdict(one.ratio))
    return None


def _measure(setup: BenchSetup) -> _Speed:
    """Measure layers, then the model."""
    policy = Policy.load(setup.device, forced=setup.backend, speed=setup.speed)
    found = _Speed(reason="measured")
    found.layers = measure_layers(_shapes(setup), policy, setup.progress)
    policy.save()
    packed, conversion = _packed_model(setup, policy)
    found.resident_bytes = weight_bytes(packed, conversion)
    models = {"dense": _load(setup), "packed": packed}
    found.cases = _measure_model(models, setup)
    return found


def measure_layers(
    shapes: Sequence[LayerShape], policy: Policy, progress: Progress
) -> list[LayerResult]:
    """Measure layers for few and many tokens, and let the policy remember the fastest."""
    rows = []
    clock = clock_for(policy.device)
    total = len(shapes) * len(TOKENS)
    with progress.stage("layers", total=total, detail="dense and packed", unit="cells") as told:
        for shape in shapes:
            one = LayerBench(
                shape, policy.device, torch.bfloat16, policy, clock, compile_dense=autotuned_dense
            )
            for tokens in TOKENS:
                row = one.measure(tokens)
                rows.append(row)
                told(1)
                if row.ratio and row.backend and row.dense:
                    best = {"dense": row.seconds[row.dense], row.backend: row.seconds[row.backend]}
                    size = (shape.rows, shape.width)
                    policy.remember(size, torch.bfloat16, bucket_of(tokens), best)
    return rows


def _shapes(setup: BenchSetup) -> list[LayerShape]:
    sizes: dict[tuple[int, int], LayerShape] = {}
    for one in find_linears(skeleton(load_config(setup.folder))):
        size = (one.out_features, one.in_features)
        name = one.name.rpartition(".")[2]
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
    with setup.progress.stage("model", total=len(cases), detail="in turns", unit="cases") as told:
        for case, batch, context, measure in cases:
            rows.append(_guarded(case, batch, context, partial(measure, clock=clock)))
            told(1)
    return rows


def _guarded(
    case: str, batch: int, context: int, measure: Callable[[], ModelResult]
) -> ModelResult:
    """Measure a case; one that fails (no memory, a context too long) says why."""
    try:
        return measure()
    except PrunebenchError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return ModelResult(case, batch, context, None, None, None, None, None, reason)
    finally:
        gc.collect()


def _load(setup: BenchSetup) -> nn.Module:
    source = ModelSource(setup.folder.resolve().name, "folder", str(setup.folder))
    revision = setup.result.model.evaluated_sha256 if setup.result and setup.result.model else ""
    revision = revision or str(max(p.stat().st_mtime_ns for p in setup.folder.iterdir()))
    local = unpacked(LocalModel(source, setup.folder, revision), setup.progress)
    with setup.progress.stage("load", detail=f"{setup.folder} in bfloat16 on {setup.device}"):
        return load_model(local.path, dtype=torch.bfloat16, device=setup.device)


def _packed_model(setup: BenchSetup, policy: Policy) -> tuple[nn.Module, Conversion]:
    model = _load(setup)
    with setup.progress.stage("pack", detail="linears, one after the other"):
        return model, convert(model, find_linears(model), policy=policy)


def weight_bytes(model: Any, conversion: Conversion) -> int:
    """Return what the weights of a converted model take, by storage."""
    rest = sum(one.nbytes for one in model.parameters())
    return int(rest + conversion.stored_bytes)
