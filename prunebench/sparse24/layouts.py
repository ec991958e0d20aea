"""How a layer keeps its 2:4 weight in memory: as in files, or in the order that a kernel reads.

A form is made from `Packed24` and gives it back. Only one form of a layer is resident.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.sparse24.packed import Packed24, unpack24


class WeightLayout(Protocol):
    """A 2:4 matrix [N, K] in memory; `stored_bytes` is what it takes, by storage."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def stored_bytes(self) -> int: ...  # noqa: D102
    def packed(self) -> Packed24: ...  # noqa: D102
    def write_dense(self, out: Float[Tensor, "out in"]) -> None: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class FileLayout:
    """The matrix as files hold it."""

    matrix: Packed24
    name: str = "canonical"

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.matrix.device

    @property
    def stored_bytes(self) -> int:
        """By storage."""
        return self.matrix.bytes

    def packed(self) -> Packed24:
        """Return the matrix as it is."""
        return self.matrix

    def write_dense(self, out: Float[Tensor, "out in"]) -> None:
        """Unpack into `out`."""
        unpack24(self.matrix, out=out)


class Workspace:
    """One dense matrix a device and dtype, as large as the largest that was asked for.

    Layers run one after the other, so that all of them share it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def matrix(self, form: WeightLayout) -> Float[Tensor, "out in"]:
        """Return room for the dense matrix of a form; what was in it before is gone."""
        rows, width = form.shape
        key = (form.device, form.dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * width:
            self._buffers.pop(key, None)  # let go of the old one before the new one is made
            buffer = torch.empty(rows * width, dtype=form.dtype, device=form.device)
            self._buffers[key] = buffer
        return buffer[: rows * width].view(rows, width)

    @property
    def bytes(self) -> int:
        """What it takes now."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
