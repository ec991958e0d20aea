"""Retry batches that run out of memory at half the size.

Every row of a batch is an independent sequence, so half a batch at a time is the same computation.
(A device may choose another kernel for fewer rows, which rounds differently in the last bit, as
another device would; that a batch was halved is therefore reported, and recorded in the result.)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_HOST_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
_listeners: list[Callable[[str, int], None]] = []


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that a device or the host is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _HOST_MESSAGES)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # a C library other than glibc
        return None
    return trim


def return_free_memory() -> None:
    """Return freed memory from glibc's heap to the system; do nothing with another C library.

    By itself glibc returns only the top of its heap, so a long-lived tensor holds all below it.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def on_batch_halved(listener: Callable[[str, int], None]) -> Iterator[None]:
    """Call `listener(what, size)` whenever batches of `what` are halved to `size` sequences."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def report_halved(what: str, size: int) -> None:
    """Report that batches of `what` hold `size` sequences from now on, and free cached memory."""
    gc.collect()  # frames of the error may be in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for listener in _listeners:
        listener(what, size)


class AutoBatch:
    """Run batches, in parts once a batch has run out of memory; a failed size is not tried again.

    Attributes:
        what: What the batches are for, in the message.
        size: Largest number of sequences at a time; None until a batch has run out of memory.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.size: int | None = None

    def run(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Iterator[Tensor]:
        """Yield the outputs of a function for consecutive parts of a batch, or for all of it.

        Args:
            function: Takes (samples, ...) and returns a tensor with as many rows.
            batch: The whole batch.

        Raises:
            RuntimeError: A single sequence runs out of memory; the device's own error.
        """
        while len(batch):
            part = batch[: self.size]  # all of it while `size` is None
            try:
                result = function(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            else:
                yield result
                del result  # or the generator holds it while the next part runs
                batch = batch[len(part) :]
                continue
            # outside the except clause, whose traceback keeps the failed tensors alive
            self.size = (len(part) + 1) // 2
            report_halved(self.what, self.size)
