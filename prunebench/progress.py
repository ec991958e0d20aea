"""What a long task tells while it works. Library code reports here and never prints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

Advance = Callable[[int], None]


@runtime_checkable
class Progress(Protocol):
    """Where stages and notes go: a terminal, a log, or nowhere."""

    def stage(
        self, name: str, *, total: int | None = None, detail: str = "", unit: str = ""
    ) -> AbstractContextManager[Advance]:
        """Open a stage of `total` units of work; the value yielded takes work as it is done."""

    def note(self, text: str) -> None:
        """Say one line that the user should see."""


class Silent:
    """A `Progress` that says nothing."""

    @contextlib.contextmanager
    def stage(
        self, name: str, *, total: int | None = None, detail: str = "", unit: str = ""
    ) -> Iterator[Advance]:
        """Yield a function that ignores what it is told."""
        yield lambda done: None

    def note(self, text: str) -> None:
        """Ignore the note."""


class StageClock:
    """A `Progress` that passes everything on and remembers the seconds of each stage.

    A stage opened inside another one counts for itself and for the outer one.

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
        outer, self.current = self.current, name
        started = time.perf_counter()
        with self._progress.stage(name, total=total, detail=detail, unit=unit) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.current = outer

    def note(self, text: str) -> None:
        """Pass the note on."""
        self._progress.note(text)
