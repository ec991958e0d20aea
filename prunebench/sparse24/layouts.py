"""In-memory layouts of a 2:4 weight: the file layout, and the protocol of those of kernels.

A layout is built from `Packed24` and converts back without loss. A layer stores its weight in one
layout only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from prunebench.sparse24.packed import Packed24, unpack24

# Of all workspaces, and made here: `torch.compile` traces the constructor of one.
_LOCK = threading.Lock()


class WeightLayout(Protocol):
    """A 2:4 matrix [N, K] in memory; `stored_bytes` counts all of its tensors, with padding."""

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
    """The layout of checkpoint files."""

    matrix: Packed24
    name: str = "canonical"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense matrix."""
        return self.matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.matrix.device

    @property
    def stored_bytes(self) -> int:
        """Bytes of values and codes."""
        return self.matrix.bytes

    def packed(self) -> Packed24:
        """Return the matrix itself."""
        return self.matrix

    def write_dense(self, out: Float[Tensor, "out in"]) -> None:
        """Unpack into `out`, [out, in]."""
        unpack24(self.matrix, out=out)


class Workspace:
    """One dense buffer per device and dtype, as large as the largest matrix so far.

    All layers share it: they run one after the other, on a GPU in one stream, and other threads
    wait. No buffer is ever freed: a CUDA graph that was captured with it writes to its address at
    every replay.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    @contextmanager
    def unpacked(self, form: WeightLayout) -> Iterator[Float[Tensor, "out in"]]:
        """Unpack a layout; inside the context no other thread writes to the matrix."""
        with _LOCK:
            dense = self.matrix(form)
            form.write_dense(dense)
            yield dense

    def matrix(self, form: WeightLayout) -> Float[Tensor, "out in"]:
        """Return an uninitialized [out, in] view for the dense matrix of a layout."""
        rows, width = form.shape
        buffers = self._buffers.setdefault((form.device, form.dtype), [])
        # The last one is the largest: `convert` asks for the largest layer first.
        if not buffers or buffers[-1].numel() < rows * width:
            buffers.append(torch.empty(rows * width, dtype=form.dtype, device=form.device))
        # [out, in], contiguous: a prefix of the flat buffer
        return buffers[-1][: rows * width].view(rows, width)

    @property
    def bytes(self) -> int:
        """Current size of all buffers."""
        return sum(buffer.nbytes for each in self._buffers.values() for buffer in each)
