"""Estimate memory, disk and time of a run on this machine before it loads a weight.

Memory is counted (`models.footprint`, `run.memory`); the method's part and all times come from a
small probe (`run.probe`). Times leave out what does not grow with the model: imports, tokenizing,
lm-eval's own work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from prunebench.errors import OutOfMemory, SaveError
from prunebench.evaluate.perplexity import BATCH_TOKENS as SCORE_TOKENS
from prunebench.files import cache_dir, free_disk
from prunebench.models.footprint import count_footprint
from prunebench.models.linears import Linear
from prunebench.models.load import load_config, skeleton
from prunebench.models.safetensors_files import weight_files
from prunebench.models.walker import BATCH_TOKENS
from prunebench.pruners import METHODS
from prunebench.pruners.layer import GroupPruner
from prunebench.run.memory import (
    DENSE_STREAM,
    STATES,
    MemoryNeed,
    Sizes,
    Workload,
    free_memory,
    gigabytes,
    model_sizes,
    plan_memory,
)
from prunebench.run.plan import Plan
from prunebench.run.probe import Machine, MethodCost, probe_machine, probe_method

_MARGIN = 1.1  # over the count: scratch memory of kernels, fragmentation


@dataclass(frozen=True)
class Forecast:
    """Estimated memory and time of a run.

    Attributes:
        need: Peak bytes.
        device_free: Bytes that are free on the compute device.
        host_free: Bytes that are free in host memory.
        disk_free: Bytes that are free in the cache.
        seconds: By stage; empty where the method cannot be probed. Of a method that learns, only
            the recovery that follows: its training has a forecast of its own.
    """

    need: MemoryNeed
    device_free: int
    host_free: int
    disk_free: int
    seconds: dict[str, float]


def forecast(plan: Plan) -> Forecast:
    """Count and probe memory and time of a run.

    Raises:
        NotImplementedError: The architecture cannot be run without its weights (mixtures of
            experts choose by the data).
    """
    dtype = getattr(torch, plan.spec.dtype)
    config = load_config(plan.model.path)
    sizes = model_sizes(skeleton(config), dtype)
    work = work_of(plan)
    footprint = count_footprint(
        config, dtype, calibration=(work.batch, max(2, work.seqlen)),
        scoring=(work.scored, work.window), hessian=work.hessian, trained=_trained_windows(plan),
    )  # fmt: skip
    groups = groups_of(plan.linears)  # (rows, width) of each
    cost = None
    # a method that walks the model in its own way cannot be tried on single matrices
    if isinstance(plan.pruner, GroupPruner) and not plan.pruner.needs.gradients:
        cost = probe_method(plan.pruner, plan.sparsity, plan.device)
    need = plan_memory(
        sizes, config.get_text_config().hidden_size, footprint, work,
        # one group at a time is worked on: the largest counts
        method_peak=max(cost.peak(*group) for group in groups) if cost else 0,
        dtype=dtype, weights=plan.weights, placement=plan.setup.activations,
        on_gpu=plan.device.type == "cuda", process=anonymous_bytes(),
    )  # fmt: skip
    machine = probe_machine(plan.linears, dtype, plan.device, weight_files(plan.model.path)[0])
    seconds = _seconds(plan, sizes, work, cost, machine, groups) if cost else {}
    if plan.training is not None:
        seconds = _recovery_seconds(plan, work, machine)
    host = torch.device("cpu")
    return Forecast(
        need, free_memory(plan.device), free_memory(host), free_disk(cache_dir()), seconds
    )


def work_of(plan: Plan) -> Workload:
    """Return the numbers of a run that its memory and time depend on."""
    windows = plan.windows.token_ids if plan.windows else None
    samples, seqlen = windows.shape if windows is not None else (0, 0)
    device = plan.device.type
    longest = max((text.windows.shape[1] for text in plan.texts), default=2)
    return Workload(
        samples=samples,
        seqlen=seqlen,
        # as the walker batches: by tokens, at least one window
        batch=min(samples, max(1, BATCH_TOKENS.get(device, 4096) // seqlen)) if samples else 1,
        windows=max((len(text.windows) for text in plan.texts), default=0),
        window=longest,
        scored=max(1, SCORE_TOKENS.get(device, 2048) // longest),
        sequential=plan.spec.within_block == "sequential",
        hessian=plan.pruner.needs.hessian,
        reports=plan.spec.divergence,
        recovers=plan.recoverer is not None and bool(samples),
        copies=plan.recoverer.cost(samples=samples).copies if plan.recoverer and samples else 0.0,
        kept=kept_bytes(plan),
    )


def kept_bytes(plan: Plan) -> int:
    """Return the bytes of dense weights that a run keeps for its recovery.

    An end-to-end recovery has them as its teacher. A method that learns changes all blocks at its
    end, and a recovery by blocks begins at the dense ones.
    """
    copies = (plan.model_recoverer is not None) + (
        plan.recoverer is not None and plan.training is not None
    )
    weights = sum(linear.size for linear in plan.linears)
    dtype: torch.dtype = getattr(torch, plan.spec.dtype)
    return copies * weights * dtype.itemsize


def _trained_windows(plan: Plan) -> int:
    """Return how many windows a recovery trains on at a time; 0 without one."""
    if plan.recoverer is None or plan.windows is None:
        return 0
    return plan.recoverer.cost(samples=len(plan.windows.token_ids)).batch


def groups_of(linears: list[Linear]) -> list[tuple[int, int]]:
    """Return rows and width of the first block's groups: neighbours of one width share an input.

    Where two inputs have one width (an output projection behind q, k and v) the group comes out
    too large, which is the safe side.
    """
    linears = [linear for linear in linears if linear.block_index == 0]
    return [
        (sum(linear.out_features for linear in members), width)
        for width, run in itertools.groupby(linears, lambda linear: linear.in_features)
        if (members := list(run))
    ]


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    info = psutil.Process().memory_info()
    # pages of mapped libraries are shared and can be dropped; psutil has "shared" on Linux only
    return int(info.rss - getattr(info, "shared", 0))


def _seconds(
    plan: Plan,
    sizes: Sizes,
    work: Workload,
    cost: MethodCost,
    machine: Machine,
    groups: list[tuple[int, int]],
) -> dict[str, float]:
    blocks = len(sizes.blocks)
    products = sum(linear.size for linear in plan.linears)  # multiply-adds of one token
    reading = sizes.total / machine.read_bytes if plan.weights == "disk" else 0.0
    # joint: once to collect statistics, once more with the pruned weights for the next block's
    # inputs
    passes = 1 if work.sequential else 2
    tokens = work.samples * work.seqlen
    solving = blocks * sum(cost.time(*group) for group in groups)
    scored = sum(text.windows.numel() for text in plan.texts)
    # `outside` holds embedding and head; only the head multiplies, hence about half
    scoring = reading + scored * (products + sizes.outside / 2) / machine.flops
    stages = {"load": reading + sizes.total / machine.read_bytes}
    if not METHODS.find(plan.spec.method).is_baseline:
        stages["baseline"] = scoring
        stages["prune"] = 3 * reading + passes * tokens * products / machine.flops + solving
    stages |= _recovery_seconds(plan, work, machine)
    return stages | {"measure": reading, "score": scoring}


def _recovery_seconds(plan: Plan, work: Workload, machine: Machine) -> dict[str, float]:
    """Return the seconds of a recovery by blocks; empty without one."""
    if plan.recoverer is None or not work.recovers:
        return {}
    products = sum(linear.size for linear in plan.linears)
    # one pass for the dense stream; sequential also needs one for the next block's inputs
    passes = plan.recoverer.cost(samples=work.samples).passes + (2 if work.sequential else 1)
    return {"recover": passes * work.samples * work.seqlen * products / machine.flops}


def require_fits(plan: Plan, expected: Forecast) -> None:
    """Refuse a run that does not fit, and name the option that makes it fit.

    Raises:
        OutOfMemory: The device or the host has too little memory.
        SaveError: The cache has too little room.
    """
    need = expected.need
    for name, size, free in (
        (str(plan.device), need.device_total, expected.device_free),
        ("the host", need.host_total, expected.host_free),
    ):
        # size 0: on a CPU, all is device memory and nothing counts as the host's
        if size * _MARGIN > free and size:
            raise OutOfMemory(
                f"{plan.spec.method} on {plan.spec.model} does not fit",
                where=f"{gigabytes(size * _MARGIN)} are needed on {name} with a tenth to spare, "
                f"{gigabytes(free)} are free",
                fix=_what_would_fit(plan, need),
            )
    if need.disk * _MARGIN > expected.disk_free:
        raise SaveError(
            f"{plan.spec.method} on {plan.spec.model} does not fit on the disk of the cache",
            where=f"{gigabytes(need.disk)} are needed, {gigabytes(expected.disk_free)} are free",
            fix="free space there, or set PRUNEBENCH_CACHE to a folder on another disk",
        )


def require_training_fits(plan: Plan, memory: Mapping[str, int]) -> None:
    """Refuse an end-to-end recovery that does not fit, and name the options that make it fit.

    Args:
        plan: Of the run.
        memory: Bytes by item.

    Raises:
        OutOfMemory: The device has too little memory.
    """
    size, free = sum(memory.values()) * _MARGIN, free_memory(plan.device)
    if size > free:
        raise OutOfMemory(
            f"--recover {plan.spec.recover} on {plan.spec.model} does not fit",
            where=f"{gigabytes(size)} are needed on {plan.device} with a tenth to spare, "
            f"{gigabytes(free)} are free",
            fix="use torchrun with more processes, --set recover.rank=8, --dtype bfloat16, or a "
            "smaller recover.micro_tokens",
        )


def _what_would_fit(plan: Plan, need: MemoryNeed) -> str:
    """Return the option that reduces the largest part."""
    largest = max({**need.host, **need.device}.items(), key=lambda item: item[1])[0]
    if plan.weights == "resident" and largest == "blocks":
        return "use --weights disk"
    if largest in (STATES, DENSE_STREAM) and plan.weights == "disk":
        return "use --activations disk, or fewer --calibration-samples"
    if plan.spec.within_block == "sequential":
        return "use --within-block joint, which has one batch at work at a time"
    if plan.spec.dtype == "float32":
        return "use --dtype bfloat16"
    return f"the most is taken by {largest}: use a shorter --seqlen, or a larger machine"


def duration(seconds: float) -> str:
    """Format a duration."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
