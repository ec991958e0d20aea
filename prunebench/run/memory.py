"""The peak memory of a run, and the memory that is free.

Sizes follow from the shapes in the config. What running a block takes is counted, not guessed: one
block runs on the meta device, where tensors have shapes and no memory, and every tensor that exists
is added up. What a method adds is counted too, on small matrices, and scaled (`run.probe`).
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from prunebench.models.footprint import BlockFootprint
from prunebench.models.linears import find_blocks
from prunebench.spec import Placement, Weights

STATES = "hidden states"
DENSE_STREAM = "dense stream of the recovery"
DENSE_COPY = "dense weights for the recovery"
_HEADROOM = 1.2  # memory of pruning and scoring, relative to a resident model


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parameters in the dtype of the run, from its shapes.

    Attributes:
        outside: Embeddings, norms and head.
        blocks: Each block.
    """

    outside: int
    blocks: tuple[int, ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return self.outside + sum(self.blocks)


def model_sizes(model: nn.Module, dtype: torch.dtype) -> Sizes:
    """Return the sizes of a model on any device, the meta device included."""
    # numel and not nbytes: the skeleton may be float32, the run is in `dtype`
    _, blocks = find_blocks(model)
    each = tuple(sum(p.numel() for p in block.parameters()) * dtype.itemsize for block in blocks)
    everything = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return Sizes(everything - sum(each), each)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take on a device.

    For the host: the least of free system memory, control group and process limits.
    """
    if device.type == "cuda":
        # asks the driver, so it also knows of other processes on this GPU; what torch's allocator
        # has cached counts as used
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    # "available" and not "free": the page cache gives way when memory is asked for
    headroom = [psutil.virtual_memory().available, *_cgroup_headroom(), *_rlimit_headroom()]
    return max(0, int(min(headroom)))


def _cgroup_headroom() -> list[int]:
    """Return the bytes left in the control group (version 2, then 1)."""
    headroom = []
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        # no such file: the other version, or not Linux; memory.max holds the word "max" without a
        # limit
        with contextlib.suppress(OSError, ValueError):
            headroom.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return headroom


def _rlimit_headroom() -> list[int]:
    """Return the bytes left by `ulimit -v` and `ulimit -d`."""
    import resource

    memory = psutil.Process().memory_info()
    return [
        limit - used
        # address space is compared with virtual size: mapped files count, too
        for kind, used in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.rss))
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY
    ]


def choose_weights(sizes: Sizes, device: torch.device) -> tuple[Weights, str]:
    """Choose between weights in memory and on disk, with the reason.

    Returns:
        `resident` where the whole model fits with room to work, else `disk`; and the reason.
    """
    need, free = round(sizes.total * _HEADROOM), free_memory(device)
    facts = f"{gigabytes(need)} needed in memory, {gigabytes(free)} free on {device}"
    return ("resident", facts) if need <= free else ("disk", facts)


@dataclass(frozen=True)
class Workload:
    """The numbers of a run that its memory depends on.

    Attributes:
        samples: Calibration windows; 0 for a method without data.
        seqlen: Tokens of one.
        batch: Calibration windows in a batch.
        windows: Windows that are scored, of all texts.
        window: Tokens of the longest.
        scored: Windows in a batch that is scored.
        sequential: Whether each linear is pruned before it runs.
        hessian: Whether Gram matrices are collected.
        reports: Whether the dense model's outputs are kept for comparison.
        recovers: Whether the blocks are trained after pruning, beside the dense stream.
        copies: float32 copies of a block that the training holds beside the gradient.
        kept: Bytes of dense weights that wait in host memory for a recovery.
    """

    samples: int
    seqlen: int
    batch: int
    windows: int
    window: int
    scored: int
    sequential: bool
    hessian: bool
    reports: bool = False
    recovers: bool = False
    copies: float = 0.0
    kept: int = 0


@dataclass(frozen=True)
class MemoryNeed:
    """Peak bytes of a run, by purpose.

    Attributes:
        device: On the compute device, by what; on a CPU this is host memory.
        host: In host memory beside a GPU, by what; empty on a CPU.
        disk: In the cache, while the run lasts.
    """

    device: dict[str, int]
    host: dict[str, int]
    disk: int

    @property
    def device_total(self) -> int:
        """All that is on the device at the peak."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """All that is in host memory beside a GPU at the peak."""
        return sum(self.host.values())


def plan_memory(
    sizes: Sizes,
    hidden_size: int,
    footprint: BlockFootprint,
    work: Workload,
    *,
    method_peak: int,
    dtype: torch.dtype,
    weights: Weights,
    placement: Placement,
    on_gpu: bool,
    process: int,
) -> MemoryNeed:
    """Add up the peak memory of a run.

    Args:
        sizes: Of the parameters.
        hidden_size: Width of a hidden state.
        footprint: Of running a block.
        work: What the run does.
        method_peak: What the method takes for its largest group of linears.
        dtype: Of the run.
        weights: Where they are.
        placement: Where hidden states are stored between blocks.
        on_gpu: Whether the compute device is a GPU.
        process: Bytes of this process before it loads anything.
    """
    token = hidden_size * dtype.itemsize  # bytes of one token's hidden state
    # hidden states of all calibration windows wait between blocks: [samples, seqlen, hidden]
    calibrating = work.samples * work.seqlen * token
    # resident weights score batch by batch; from disk, all windows go through a block together, so
    # that each block is read once
    scoring = work.windows * work.window * token * (weights == "disk")
    # the dense model's last hidden states, kept beside those of the pruned one
    if work.reports:
        scoring += work.windows * work.window * token
    # in float32, whatever the dtype of the run
    masters = round(work.copies * max(sizes.blocks) * 4 / dtype.itemsize)
    stage = _largest_stage(
        footprint, work, calibrating=calibrating, scoring=scoring, method_peak=method_peak,
        masters=masters,
    )  # fmt: skip
    device, host = _weights(sizes, weights, on_gpu=on_gpu)
    # on a CPU, "cpu" and "device" are the same memory; on disk hidden states are memory-mapped
    place = {"device": device, "cpu": host if on_gpu else device, "disk": None}
    where = place[placement if weights == "disk" else "device"]
    for name, size in stage.items():
        if name not in (STATES, DENSE_STREAM):
            device[name] = size
        elif where is not None:
            where[name] = size
    (host if on_gpu else device)["Python and libraries"] = process
    if work.kept:
        (host if on_gpu else device)[DENSE_COPY] = work.kept
    streams = calibrating * (2 if work.recovers else 1)
    # every pruned block, and hidden states twice: new ones are written before the old are removed
    journal = sum(sizes.blocks) + 2 * streams if weights == "disk" else 0
    mapped = max(streams, scoring) if weights == "disk" and placement == "disk" else 0
    return MemoryNeed(device, host, journal + mapped)


def _largest_stage(
    footprint: BlockFootprint,
    work: Workload,
    *,
    calibrating: int,
    scoring: int,
    method_peak: int,
    masters: int,
) -> dict[str, int]:
    """Return the bytes of the stage that takes most beside the weights, by what.

    Args:
        footprint: Of running a block.
        work: What the run does.
        calibrating: Hidden states of the calibration set.
        scoring: Hidden states of the scored texts.
        method_peak: What the method takes for its largest group of linears.
        masters: float32 copies of a block in a recovery.
    """
    # sequential replays the block for each linear, so every batch's tensors exist at a time; joint
    # drops a batch before the next
    batches = math.ceil(work.samples / work.batch) if work.samples else 0
    running = footprint.collecting * (batches if work.sequential else 1) if work.samples else 0
    # running a batch and solving do not overlap: the larger of the two counts, not the sum
    pruning = calibrating + max(running, footprint.statistics * bool(work.samples) + method_peak)
    # pruning and scoring do not overlap either: the stage that takes more in all counts
    judging = scoring + footprint.running + footprint.head
    busy = "one batch, statistics, method"
    stages = [
        {STATES: calibrating, busy: pruning - calibrating},
        {STATES: scoring, busy: judging - scoring},
    ]
    if work.recovers:
        stages[0][DENSE_STREAM] = calibrating
        training = {"recovery: master, moments": masters, "recovery: batch": footprint.training}
        stages.append({STATES: calibrating, DENSE_STREAM: calibrating, **training})
    # the stages do not overlap: the one that takes most in all counts
    return max(stages, key=lambda parts: sum(parts.values()))


def _weights(
    sizes: Sizes, weights: Weights, *, on_gpu: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of the model's weights on the device, and in host memory beside a GPU."""
    device: dict[str, int] = {"embeddings, norms and head": sizes.outside}
    host: dict[str, int] = {}
    if weights == "resident":
        device["blocks"] = sum(sizes.blocks)
    else:
        # two blocks: one is worked on while the next is read
        device["the block at work"] = max(sizes.blocks)
        (host if on_gpu else device)["the block that is read"] = max(sizes.blocks)
    return device, host


def gigabytes(count: float) -> str:
    """Format a number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
