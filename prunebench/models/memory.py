"""Out of memory, one batch at a time: halve the batch, say so, go on.

Every row of a batch is a sequence of its own, so half a batch at a time is the same computation.
(A device may choose another kernel for fewer rows, whose sums round otherwise in the last bit, as
another device would; that a batch was halved is therefore told, and recorded in the result.)
"""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def halvings_heard(listener: Callable[[str, int], None]) -> Iterator[None]:
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


def halved_if_needed(
    run: Callable[[Tensor], Tensor], batch: Tensor, *, what: str
) -> Iterator[Tensor]:
    """Yield what `run` makes of a batch: whole, or of consecutive parts of it.

    Args:
        run: From (samples, ...) to a tensor with as many rows.
        batch: The whole batch.
        what: For the message.

    Raises:
        RuntimeError: One sequence alone is too much; the device's own error.
    """
    try:
        whole = run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
    else:
        yield whole
        return
    size = (len(batch) + 1) // 2
    tell_halved(what, size)
    for part in torch.split(batch, size):
        yield from halved_if_needed(run, part, what=what)
