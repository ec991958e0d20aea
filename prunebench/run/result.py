"""Build the blocks of a result from the plan and the measurements."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from prunebench import __version__
from prunebench.allocators import ALLOCATORS, FILE
from prunebench.allocators.allocation import Allocation
from prunebench.models.measure import Measured
from prunebench.models.pruned_block import RecoveredBlock
from prunebench.pruners import METHODS
from prunebench.pruners.protocol import PruneReport, grid_of
from prunebench.recovery import describe
from prunebench.recovery.protocol import ModelRecovery
from prunebench.results.quantization_schema import QuantizationBlock
from prunebench.results.recovery_schema import (
    BlockRow,
    DistillStep,
    EndToEndBlock,
    RecoveryBlock,
)
from prunebench.results.removal_schema import BlockScore, RemovalBlock
from prunebench.results.schema import (
    AllocationBlock,
    CostBlock,
    FailureBlock,
    HardwareBlock,
    LayerSparsity,
    MethodBlock,
    MethodEvent,
    ModelBlock,
    PriorScore,
    Result,
    SoftwareBlock,
    SparsityBlock,
    TrainingBlock,
    TrainingPoint,
)
from prunebench.results.store import new_run_id
from prunebench.results.versions import parts_of, versions_of
from prunebench.run.plan import Plan
from prunebench.run.resolve import ResolvedSpec
from prunebench.spec import NO_RECOVERY, RunSpec


def build_identity(resolved: ResolvedSpec, *, status: str) -> dict[str, Any]:
    """Return the fields that every result has, finished or failed."""
    spec = resolved.spec
    return {
        "id": new_run_id(spec),
        "status": status,
        # UTC: results of several machines are sorted by it
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": resolved.setup.command,
        "spec_id": spec.spec_id,
        "spec": spec,
        "versions": versions_of(parts_of(spec)),
        "hardware": describe_hardware(resolved.device, count=len(resolved.devices)),
        "software": describe_software(with_tasks=bool(spec.tasks)),
    }


def failed_result(resolved: ResolvedSpec, *, error: str, stage: str, message: str) -> Result:
    """Return the record of a run that did not finish."""
    # cut: a library's message can be pages long
    failure = FailureBlock(stage=stage, error=error, message=message[:500])
    return Result(**build_identity(resolved, status="failed"), failure=failure)


def build_model_block(
    plan: Plan, model: nn.Module, report: PruneReport, dense_sha256: str, evaluated_sha256: str
) -> ModelBlock:
    """Describe which weights were pruned; the dense model's are counted."""
    gone = report.removal.parameters if report.removal else 0
    return ModelBlock(
        id=plan.spec.model,
        source=plan.model.source.kind,
        revision=plan.model.revision,
        pull_request=plan.model.pull_request,
        architecture=type(model).__name__,
        # tied embeddings are one parameter, and counted once
        parameters=sum(p.numel() for p in model.parameters()) + gone,
        prunable_parameters=sum(linear.size for linear in plan.linears),
        dtype=plan.spec.dtype,
        dense_sha256=dense_sha256,
        evaluated_sha256=evaluated_sha256,
    )


def build_method_block(spec: RunSpec, report: PruneReport) -> MethodBlock:
    """Describe the method, its options and its per-layer anomalies."""
    row = METHODS.find(spec.method)
    return MethodBlock(
        name=spec.method,
        implementation=row.target,
        version=METHODS.find(spec.method).distribution,
        options=spec.method_options,
        paper=row.paper,
        events=[MethodEvent(layer=e.layer, kind=e.kind, value=e.value) for e in report.events],
    )


def build_allocation_block(spec: RunSpec, allocation: Allocation) -> AllocationBlock | None:
    """Describe the allocator that spread the target over the layers."""
    if spec.allocation == "uniform":
        return None
    row = FILE if spec.allocation == "file" else ALLOCATORS.find(spec.allocation)
    return AllocationBlock(
        name=spec.allocation,
        implementation=row.target,
        version=row.distribution,
        options=spec.allocation_options,
        paper=row.paper,
        facts=dict(allocation.facts),
    )


def build_training_block(plan: Plan, report: PruneReport) -> TrainingBlock | None:
    """Describe the training text, windows and curve."""
    learned, training = report.learned, plan.training
    if learned is None or training is None or plan.training_text is None:
        return None
    text, origin = plan.training_text.name, plan.training_text.origin
    return TrainingBlock(
        text=text,
        origin=origin,
        windows=len(training.train),
        held_out_windows=len(training.held_out),
        seqlen=training.train.shape[1],  # of [windows, seqlen]
        tokens_sha256=training.sha256,
        best_step=learned.best_step,
        processes=learned.processes,
        curve=[TrainingPoint(**dataclasses.asdict(point)) for point in learned.curve],
        prior_scores=[
            PriorScore(metric=metric, protocol=score.protocol, value=measure.value)
            for score in learned.prior_scores
            for metric, measure in score.measures.items()
        ],
    )


def build_recovery_block(
    plan: Plan, blocks: list[RecoveredBlock], trained: ModelRecovery | None
) -> RecoveryBlock | None:
    """Describe the recovery, and the blocks in which trained weights stayed."""
    spec = plan.spec
    if spec.recover == NO_RECOVERY:
        return None
    row = describe(spec.recover)
    training = _build_end_to_end(plan, trained)
    seconds = sum(block.seconds for block in blocks) + (training.seconds if training else 0.0)
    measured = [
        (block.held_out_before, block.held_out_after)
        for block in blocks
        if block.held_out_before and block.held_out_after
    ]
    names = BlockRow.model_fields
    return RecoveryBlock(
        name=spec.recover,
        implementation=row.target,
        version=row.distribution,
        options=spec.recover_options,
        paper=row.paper,
        windows=max((block.windows for block in blocks), default=0),
        held_out_windows=max((block.held_out_windows for block in blocks), default=0),
        seqlen=spec.seqlen or 0,
        tokens=max((block.tokens for block in blocks), default=0),
        seconds=round(seconds, 3),
        recovered_blocks=sum(block.best_step > 0 for block in blocks),
        held_out_before=_geometric_mean([before for before, _ in measured]),
        held_out_after=_geometric_mean([after for _, after in measured]),
        blocks=[
            BlockRow(**{k: v for k, v in dataclasses.asdict(block).items() if k in names})
            for block in blocks
        ],
        training=training,
    )


def _build_end_to_end(plan: Plan, trained: ModelRecovery | None) -> EndToEndBlock | None:
    """Describe the training of the whole model."""
    data, text = plan.recovery_training, plan.recovery_text
    if trained is None or data is None or text is None:
        return None
    curve = [DistillStep(**dataclasses.asdict(point)) for point in trained.curve]
    measured = {point.step: point.held_out for point in curve if point.held_out is not None}
    return EndToEndBlock(
        text=text.name,
        origin=text.origin,
        windows=len(data.train),
        held_out_windows=len(data.held_out),
        seqlen=data.train.shape[1],  # of [windows, seqlen]
        tokens_sha256=data.sha256,
        steps=curve[-1].step,
        tokens=curve[-1].tokens,
        seconds=round(curve[-1].seconds, 3),
        best_step=trained.best_step,
        resumed_step=trained.resumed,
        processes=trained.processes,
        before=measured[0],
        after=measured[trained.best_step],
        curve=curve,
    )


def _geometric_mean(values: list[float]) -> float | None:
    # the errors of early and late blocks differ by orders of magnitude
    return statistics.geometric_mean(values) if values else None


def build_sparsity_block(
    plan: Plan,
    measured: list[Measured],
    report: PruneReport,
    allocation: Allocation,
) -> SparsityBlock:
    """Describe the sparsity measured on the weights."""
    total = sum(layer.linear.size for layer in measured)

    def requested(name: str) -> str:
        # of a method that removes blocks, no matrix that stays is to have zeros
        ratio = 0.0 if report.removal else allocation.ratios[name]
        return str(plan.sparsity.with_ratio(ratio))

    return SparsityBlock(
        requested=str(plan.sparsity),
        realised_ratio=sum(layer.zeros for layer in measured) / total,
        negative_zeros=sum(layer.negative_zeros for layer in measured),
        pattern_violations=sum(layer.violations for layer in measured),
        layers=[
            LayerSparsity(
                name=layer.linear.name,
                out_features=layer.linear.out_features,
                in_features=layer.linear.in_features,
                requested=requested(layer.linear.name),
                zeros=layer.zeros,
                loss=report.losses.get(layer.linear.name),
                estimate=allocation.estimates.get(layer.linear.name),
            )
            for layer in measured
        ],
        removal=_build_removal_block(report),
    )


def _build_removal_block(report: PruneReport) -> RemovalBlock | None:
    """Describe the blocks that are gone."""
    removal = report.removal
    if removal is None:
        return None
    return RemovalBlock(
        blocks=list(removal.blocks),
        blocks_before=removal.blocks_before,
        removed_weights=removal.weights,
        removed_parameters=removal.parameters,
        scores=[BlockScore(block=b, score=score) for b, score in report.block_scores.items()],
    )


def build_quantization_block(plan: Plan, measured: list[Measured]) -> QuantizationBlock | None:
    """Describe the grid of quantized weights, after `require_on_grid` has checked it."""
    grid = grid_of(plan.pruner)
    if grid is None:
        return None
    linears = [layer.linear for layer in measured]
    return QuantizationBlock(
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        groups=sum(grid.groups(linear.out_features, linear.in_features) for linear in linears),
        exact=plan.spec.dtype == "float32",
    )


def build_cost_block(
    plan: Plan, prune_seconds: float, *, starts: int, halvings: list[str]
) -> CostBlock:
    """Describe time and memory so far, see `CostBlock`."""
    # tensors only: what the caching allocator holds beyond them is not counted
    peaks = [
        torch.cuda.max_memory_allocated(device) for device in plan.devices if device.type == "cuda"
    ]
    return CostBlock(
        stage_seconds={name: round(s, 3) for name, s in plan.progress.seconds.items()},
        prune_seconds=round(prune_seconds, 3),
        # of this start only; prune_seconds includes earlier ones
        total_seconds=round(time.perf_counter() - plan.started, 3),
        peak_rss_bytes=peak_rss_bytes(),
        peak_gpu_bytes=max(peaks, default=None),
        weights=plan.weights,
        starts=starts,
        halved_batches=halvings,
    )


def peak_rss_bytes() -> int:
    """Return the largest resident size of this process so far.

    On Linux from `VmHWM`: `ru_maxrss` survives exec, so it would include the peak of the parent
    process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        rows = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines())
        if "VmHWM" in rows:
            return int(rows["VmHWM"].split()[0]) * 1024  # the file counts in kB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, others in kB
    return peak if sys.platform == "darwin" else peak * 1024


def describe_hardware(device: torch.device, *, count: int = 1) -> HardwareBlock:
    """Describe this machine, without its name; `count` is how many such devices are used."""
    # on Linux both name only the architecture; the model stands in /proc/cpuinfo
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        rows = (line.partition(":") for line in cpuinfo.read_text("utf-8").splitlines())
        cpu = next((value.strip() for key, _, value in rows if key.strip() == "model name"), cpu)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return HardwareBlock(
        device=device.type,
        device_name=name if count == 1 else f"{count} x {name}",
        cpu=cpu,
        cpu_threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
    )


def describe_software(*, with_tasks: bool = False) -> SoftwareBlock:
    """Return the versions that a number depends on."""
    import transformers

    return SoftwareBlock(
        prunebench=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
        # asks the metadata: importing lm-eval takes seconds
        lm_eval=metadata.version("lm-eval") if with_tasks else None,
    )
