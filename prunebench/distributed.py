"""One run in several processes, started by torchrun or accelerate launch.

Ranks come from the environment (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`). Rank 0 checks, scores and
saves; the other ranks load the model, train with it, and print nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from prunebench.errors import UsageError

_PATIENCE = timedelta(hours=12)  # the other ranks wait while rank 0 scores the dense model


def world_size() -> int:
    """Return the number of processes; 1 without a launcher."""
    # WORLD_SIZE alone does not mean that a launcher started this process
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the rank of this process; 0 without a launcher."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def device_of(name: str) -> str:
    """Return the device of this process for a `--device` value: one GPU per local rank."""
    # an explicit cuda:N is taken literally, also by every rank
    if world_size() == 1 or name not in ("auto", "cuda"):
        return name
    import torch

    if not torch.cuda.is_available():
        return name
    # the rank within this machine: RANK counts over all machines
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextlib.contextmanager
def process_group(*, device: str, trains: bool) -> Iterator[None]:
    """Join the group of processes, if there is one, and leave it at the end.

    Raises:
        UsageError: The method does not train: all processes would do the same work.
    """
    if world_size() == 1:
        yield
        return
    # checked before joining: a refusal must not leave other ranks waiting in init
    if not trains:
        raise UsageError(
            f"{world_size()} processes were started, and this method works in one",
            where="only a training is shared out",
            fix="start it without torchrun or accelerate launch",
        )
    import torch
    import torch.distributed as dist

    on_gpu = device.startswith("cuda")
    if on_gpu:
        # before init: otherwise every rank's NCCL would open its context on cuda:0
        torch.cuda.set_device(device)
    # gloo works on CPUs; NCCL on GPUs only
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
