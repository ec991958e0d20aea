"""What keeps a run from being executed with packed weights, found before a weight is loaded."""

from __future__ import annotations

import torch

from prunebench.errors import UsageError
from prunebench.sparse24.backends.table import require_backend
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec


def check_execution(
    spec: RunSpec, sparsity: Sparsity, *, backend: str | None, device: torch.device
) -> None:
    """Refuse `execute = sparse24` where it cannot be.

    Raises:
        UsageError: The sparsity is no 2:4, the dtype has 32 bits, or the backend cannot be used.
    """
    if spec.execute == "dense":
        if backend is not None:
            raise UsageError(
                f"--backend {backend} goes with --execute sparse24", fix="add --execute sparse24"
            )
        return
    if sparsity.ratio != 0 and not implies_24(sparsity):
        raise UsageError(
            f"--execute sparse24 does not go with --sparsity {sparsity}",
            where="packed weights keep at most 2 of every 4",
            fix="use --sparsity 2:4",
        )
    if spec.dtype == "float32":
        raise UsageError(
            "--execute sparse24 does not go with --dtype float32",
            where="2:4 is packed in 16 bits: no sparse tensor core takes float32",
            fix="use --dtype bfloat16",
        )
    if backend is not None:
        require_backend(backend, device)


def implies_24(sparsity: Sparsity) -> bool:
    """Whether N:M keeps at most 2 of every 4 inputs: 2:4, 1:4 and 1:2 do."""
    return (sparsity.kept, sparsity.group) in ((2, 4), (1, 4), (1, 2))
