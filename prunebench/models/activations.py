"""The hidden states of all batches between two blocks: in memory, or in memory-mapped files.

A mapped file takes no anonymous memory: the system writes its pages to disk when it needs memory,
and reads them again when their batch runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from prunebench.files import explain_os_error


class Activations:
    """One tensor for each batch, (samples, seqlen, hidden), in the memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)

    def __getitem__(self, batch: int) -> Tensor:
        return self._tensors[batch]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._tensors[batch] = hidden.to(self._device)

    def append(self, hidden: Tensor) -> None:
        """Add the hidden states of the next batch."""
        self._tensors.append(hidden.to(self._device))


class MappedActivations(Activations):
    """One tensor for each batch, each in a memory-mapped file that is already unlinked.

    Args:
        folder: A folder on the disk that should hold them.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(torch.device("cpu"))
        self._folder = folder

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        mapped = self._tensors[batch]
        if mapped.shape == hidden.shape and mapped.dtype == hidden.dtype:
            mapped.copy_(hidden)
        else:
            self._tensors[batch] = self._mapped(hidden)

    def append(self, hidden: Tensor) -> None:
        """Add the hidden states of the next batch.

        Raises:
            SaveError: The disk is full.
        """
        self._tensors.append(self._mapped(hidden))

    def _mapped(self, hidden: Tensor) -> Tensor:
        """Return a copy of a tensor in a new memory-mapped file."""
        size = hidden.numel() * hidden.element_size()
        path = self._folder / f".hidden-{os.getpid()}-{id(self)}-{len(self._tensors)}.map"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as file:
                # a full disk fails here; in a mapped page it would be a bus error
                os.posix_fallocate(file.fileno(), 0, max(1, size))
                mapped = torch.from_file(
                    str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype
                )
        except OSError as error:
            raise explain_os_error(error, self._folder) from error
        finally:
            path.unlink(missing_ok=True)  # the mapping stays valid until it is freed
        return mapped.view(hidden.shape).copy_(hidden)  # [samples, seqlen, hidden]
