"""What a device can run: several for one run, and packed 2:4 weights."""

from __future__ import annotations

import torch

from prunebench.errors import UsageError
from prunebench.run.names import NamedSpec
from prunebench.sparse24.backends.table import require_backend
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec


def require_one_device(named: NamedSpec, devices: tuple[torch.device, ...]) -> None:
    """Refuse several devices for a method that learns.

    Raises:
        UsageError: It is started as one process for each device instead.
    """
    learners = [named.spec.method] * (named.pruner.needs.training is not None)
    learners += [named.spec.recover] * (named.model_recoverer is not None)
    if len(devices) > 1 and learners:
        raise UsageError(
            f"{learners[0]} does not learn on several --device of one process",
            fix=f"torchrun --nproc-per-node {len(devices)} -m prunebench run ...",
        )


def check_packed(
    spec: RunSpec, sparsity: Sparsity, *, backend: str | None, device: torch.device
) -> None:
    """Refuse `execute = sparse24` where it cannot run.

    Raises:
        UsageError: The sparsity is no 2:4, the dtype has 32 bits, or the backend cannot be used.
    """
    if spec.execute == "dense":
        if backend is not None:
            raise UsageError(
                f"--backend {backend} goes with --execute sparse24", fix="add --execute sparse24"
            )
        return
    # ratio 0: a dense method on a checkpoint that may be 2:4 already; its weights are checked when
    # they are packed
    if sparsity.ratio != 0 and not implies_24(sparsity):
        raise UsageError(
            f"--execute sparse24 does not go with --sparsity {sparsity}",
            where="packed weights keep at most 2 of every 4",
            fix="use --sparsity 2:4",
        )
    # `auto` passes here; `resolve` asks again with the dtype that was chosen
    if spec.dtype == "float32":
        raise UsageError(
            "--execute sparse24 does not go with --dtype float32",
            where="2:4 is packed in 16 bits: no sparse tensor core takes float32",
            fix="use --dtype bfloat16",
        )
    if backend is not None:
        require_backend(backend, device)


def implies_24(sparsity: Sparsity) -> bool:
    """Return whether N:M keeps at most 2 of every 4 inputs: 2:4, 1:4 and 1:2 do."""
    # 1:2 keeps 1 of each half of a group of 4, so never more than 2 of 4
    return (sparsity.kept, sparsity.group) in ((2, 4), (1, 4), (1, 2))
