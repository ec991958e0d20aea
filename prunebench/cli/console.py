"""The console that tables are printed to."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 200  # a file or pipe has no width; rich would wrap everything at 80


def wide_console() -> Console:
    """Return a console for stdout: as wide as the terminal, or wide enough not to wrap."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(highlight=False, markup=False, width=width)
