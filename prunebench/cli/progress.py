"""Progress on stderr: bars on a terminal, one line a stage anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from prunebench.progress import Advance, Progress, Silent


def choose_progress(*, quiet: bool) -> Progress:
    """Return what suits stderr."""
    if quiet:
        return Silent()
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    return f"{value // 60:.0f} min {value % 60:02.0f} s"


class LineProgress:
    """Writes `stage  detail ... 1.2 s`; the first half at once, the second when it is done."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._open: list[str] = []
        # a stage leaves its line open; a note or an inner stage must end it first
        self._at_line_start = True

    @contextlib.contextmanager
    def stage(
        self, name: str, *, total: int | None = None, detail: str = "", unit: str = ""
    ) -> Iterator[Advance]:
        """Write the stage's line."""
        title = f"{name:<12} {detail}"
        # downloads count bytes: a number of nine digits says nothing in a log
        if total is not None and unit and unit != "B":
            title += f", {total} {unit}"
        self._write(("" if self._at_line_start else "\n") + f"{title} ... ")
        self._at_line_start = False
        self._open.append(title)
        started = time.perf_counter()
        try:
            yield lambda done: None
        except BaseException:
            self._close(title, "failed")
            raise
        self._close(title, _seconds(time.perf_counter() - started))

    def _close(self, title: str, ending: str) -> None:
        if self._at_line_start:  # inner stages have ended the line
            self._write(f"{title} ... ")
        self._write(f"{ending}\n")
        self._at_line_start = True
        self._open.remove(title)

    def note(self, text: str) -> None:
        """Write a line."""
        self._write(("" if self._at_line_start else "\n") + text + "\n")
        self._at_line_start = True

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class TerminalProgress:
    """Bars with elapsed and remaining time; a finished stage leaves one line."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(file=sys.stderr)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            # bars vanish at the end: each finished stage prints a line of its own
            transient=True,
        )
        self._depth = 0

    @contextlib.contextmanager
    def stage(
        self, name: str, *, total: int | None = None, detail: str = "", unit: str = ""
    ) -> Iterator[Advance]:
        """Show the stage's bar until it is done."""
        from rich.markup import escape

        # stages nest, and rich has one live display: the outermost starts and stops it
        if self._depth == 0:
            self._bars.start()
        self._depth += 1
        # details hold user text such as paths in [brackets], which rich would read as markup
        task: Any = self._bars.add_task(f"{name} {escape(detail)}", total=total)
        started = time.perf_counter()
        ending = "failed"
        try:
            yield lambda done: self._bars.advance(task, done)
            ending = _seconds(time.perf_counter() - started)
        finally:
            self._bars.remove_task(task)
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()
            self._console.print(f"[bold]{name:<12}[/] {escape(detail)}  [dim]{ending}[/]")

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False)
