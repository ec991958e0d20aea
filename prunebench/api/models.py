"""Models for the Python API: their folders, and what can be used of those in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from prunebench.models.in_memory import evaluation_mode, require_causal
from prunebench.models.source import fetch_model as fetch
from prunebench.models.source import find_model
from prunebench.progress import Progress, Silent, quiet_libraries


def fetch_model(name: str, *, progress: Progress | None = None) -> Path:
    """Return the folder of a model, downloaded or converted first if needed.

    Args:
        name: An alias of `prunebench list models`, org/name of the hub, or a .gguf file.
        progress: Called with the stages; by default nothing is shown.

    Raises:
        UsageError: The name is unknown.
        MissingResource: It cannot be downloaded.
    """
    with quiet_libraries():
        return fetch(find_model(name), progress or Silent()).path


@contextlib.contextmanager
def usable_model(model: nn.Module) -> Iterator[None]:
    """Refuse what is no causal language model, and evaluate it as a run does."""
    require_causal(model)
    with evaluation_mode(model):
        yield
