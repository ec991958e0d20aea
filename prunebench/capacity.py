"""What a run needs of a machine, and what the machine has.

The sizes follow from the shapes in the config; what a method adds while it works on a block is
measured on a small probe, see `probe`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from prunebench.models.linears import find_blocks
from prunebench.spec import Weights

_HEADROOM = 1.2  # of a model in memory: what pruning and scoring add


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
    _, blocks = find_blocks(model)
    each = tuple(sum(p.numel() for p in block.parameters()) * dtype.itemsize for block in blocks)
    everything = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return Sizes(everything - sum(each), each)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take on a device.

    For the host the least of what the system, the control group and the limits of the process
    leave.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    rooms = [psutil.virtual_memory().available, *_group_rooms(), *_limit_rooms()]
    return max(0, int(min(rooms)))


def _group_rooms() -> list[int]:
    """What is left in the control group (version 2, then 1)."""
    rooms = []
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        with contextlib.suppress(OSError, ValueError):
            rooms.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return rooms


def _limit_rooms() -> list[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    import resource

    mine = psutil.Process().memory_info()
    return [
        limit - used
        for kind, used in ((resource.RLIMIT_AS, mine.vms), (resource.RLIMIT_DATA, mine.rss))
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY
    ]


def choose_weights(sizes: Sizes, device: torch.device) -> tuple[Weights, str]:
    """Choose where the weights should be, and say why.

    Returns:
        `resident` where the whole model fits with room to work, else `disk`; and the reason.
    """
    need, free = round(sizes.total * _HEADROOM), free_memory(device)
    facts = f"{gigabytes(need)} needed in memory, {gigabytes(free)} free on {device}"
    return ("resident", facts) if need <= free else ("disk", facts)


def gigabytes(count: float) -> str:
    """Return a size for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
