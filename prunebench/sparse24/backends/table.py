"""The backends by name, the fastest kinds first."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from prunebench.errors import UsageError, nearest
from prunebench.sparse24.backends.cpu import CpuBackend
from prunebench.sparse24.backends.cusparselt import CuSparseLtBackend
from prunebench.sparse24.backends.protocol import Backend
from prunebench.sparse24.backends.triton import TritonBackend
from prunebench.sparse24.backends.unpack import Decompress, Reference


@functools.cache
def backends() -> Mapping[str, Backend]:
    """Return all backends by name, the fastest kinds first."""
    table: tuple[Backend, ...] = (
        TritonBackend(), CuSparseLtBackend(), CpuBackend(), Decompress(), Reference(),
    )  # fmt: skip
    return {backend.name: backend for backend in table}


def require_backend(name: str, device: torch.device) -> None:
    """Raise `UsageError` unless `name` is a backend that runs on a device."""
    if name not in backends():
        raise UsageError(f"there is no backend {name!r}", fix=nearest(name, backends()))
    verdict = backends()[name].available(device)
    if not verdict.ok:
        raise UsageError(
            f"the backend {name} cannot be used on {device}",
            where=verdict.reason,
            fix="leave --backend out, or use reference",
        )
