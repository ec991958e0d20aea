"""Out of memory, one batch at a time: halve the batch, say so, go on.

Every row of a batch is a sequence of its own, so half a batch at a time is the same computation.
(A device may choose another kernel for fewer rows, whose sums round otherwise in the last bit, as
another device would; that a batch was halved is therefore told, and recorded in the result.)
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
    """Return whether an exception says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error) for one in _HOST_MESSAGES)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return None
    return trim


def return_free_memory() -> None:
    """Give back to the system what is freed but kept by glibc, which never gives back the middle.

    Elsewhere do nothing.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def on_batch_halved(listener: Callable[[str, int], None]) -> Iterator[None]:
    """Let `listener` hear what was halved, and to how many sequences, while this is open."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell_halved(what: str, size: int) -> None:
    """Say that batches of `what` hold `size` sequences from now on, and free what can be freed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for listener in _listeners:
        listener(what, size)


class AutoBatch:
    """Runs batches, in parts where a whole one is too much; what did not fit is not tried again.

    Attributes:
        what: For the message.
        size: The most sequences at a time from now on; None as long as every batch fitted.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.size: int | None = None

    def run(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Iterator[Tensor]:
        """Yield what a function makes of a batch: whole, or of consecutive parts of it.

        Args:
            function: From (samples, ...) to a tensor with as many rows.
            batch: The whole batch.

        Raises:
            RuntimeError: One sequence alone is too much; the device's own error.
        """
        while len(batch):
            part = batch[: self.size]
            try:
                result = function(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            else:
                yield result
                del result
                batch = batch[len(part) :]
                continue
            self.size = (len(part) + 1) // 2
            tell_halved(self.what, self.size)
