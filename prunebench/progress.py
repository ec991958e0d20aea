"""Progress reports of long tasks. Library code reports here and never prints."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Advance = Callable[[int], None]


@runtime_checkable
class Progress(Protocol):
    """Where stages and notes go: a terminal, a log, or nowhere."""

    def stage(
        self, name: str, *, total: int | None = None, detail: str = "", unit: str = ""
    ) -> AbstractContextManager[Advance]:
        """Open a stage of `total` units; the function yielded is called with finished units."""

    def note(self, text: str) -> None:
        """Show one line to the user."""


class Silent:
    """A `Progress` without output."""

    @contextlib.contextmanager
    def stage(
        self, name: str, *, total: int | None = None, detail: str = "", unit: str = ""
    ) -> Iterator[Advance]:
        """Yield a function that does nothing."""
        yield lambda done: None

    def note(self, text: str) -> None:
        """Ignore the note."""


@contextlib.contextmanager
def quiet_libraries(*, warn: bool = True) -> Iterator[None]:
    """Keep other libraries from writing to the terminal.

    Disables tqdm bars and log records below an error: what matters is checked and raised. Warnings
    of other packages are shown only with `warn`; those of prunebench always, as one plain line.
    """
    import tqdm.std

    bar: Any = tqdm.std.tqdm
    # the class's __init__ is patched, as libraries keep their own references to `tqdm`
    draw, threshold = bar.__init__, logging.root.manager.disable

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        draw(self, *args, **{**kwargs, "disable": True})

    bar.__init__ = hidden
    # never more verbose than before, if quiet_libraries is nested
    logging.disable(max(threshold, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _plain(warnings.showwarning)
            # python -W or PYTHONWARNINGS: the user has asked for warnings
            if not warn and not sys.warnoptions:
                warnings.simplefilter("ignore")
                # inserted in front of the filter above: our own warnings come through
                warnings.filterwarnings("default", module=r"prunebench(\.|$)")
            yield
    finally:
        logging.disable(threshold)
        bar.__init__ = draw


def _plain(show: Callable[..., None]) -> Callable[..., None]:
    """Return a `warnings.showwarning` that shows prunebench's own without file and code."""

    def showwarning(
        message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any
    ) -> None:
        if Path(filename).is_relative_to(Path(__file__).parent):
            sys.stderr.write(f"warning: {message}\n")
        else:
            show(message, category, filename, *args, **kwargs)

    return showwarning


class StageTimer:
    """A `Progress` that forwards to another one and records the seconds of each stage.

    The time of a nested stage counts for the outer stage too.

    Attributes:
        seconds: Seconds by stage name; a name that comes twice is summed.
        current: The innermost open stage; after an exception, the one that failed.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}
        self.current = ""

    @contextlib.contextmanager
    def stage(
        self, name: str, *, total: int | None = None, detail: str = "", unit: str = ""
    ) -> Iterator[Advance]:
        """Open a stage and time it."""
        # no `finally` below: after an error `current` must still name the stage that failed
        outer, self.current = self.current, name
        started = time.perf_counter()
        with self._progress.stage(name, total=total, detail=detail, unit=unit) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.current = outer

    def note(self, text: str) -> None:
        """Forward the note."""
        self._progress.note(text)
