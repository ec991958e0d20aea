"""What a part gets: where it runs, how long it has, and where its rows go.

A row is one JSON object in one line, written when it is known: a part that is killed leaves what
it had measured.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOST = 7
"""Exit status of a part whose CUDA context is lost: nothing more can be measured in it."""

Row = dict[str, Any]


def context_error(device: torch.device) -> str:
    """Return why a device cannot be used any more; "" if it can."""
    if device.type != "cuda":
        return ""
    import torch

    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        return one_line(error)
    return ""


@dataclass
class Recorder:
    """Writes the rows of one part.

    Attributes:
        part: Its name.
        log: The file of all rows of a run, one JSON object a line.
        device: Where to measure.
        dry: Whether sizes are tiny and no speed is measured.
        seconds: How long it may take.
        context_error: Returns why the device cannot be used any more.
        give_up: Called when it cannot: ends the process without touching the device again.
    """

    part: str
    log: Path
    device: torch.device
    dry: bool
    seconds: float
    context_error: Callable[[torch.device], str] = context_error
    give_up: Callable[[int], Any] = os._exit
    _start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.perf_counter() - self._start)

    def add(self, row: str, **values: Any) -> None:
        """Write a row of a kind, with its values."""
        entry = {"part": self.part, "row": row, **values}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, default=str) + "\n")

    @contextlib.contextmanager
    def step(self, name: str, *, need: float = 0.0) -> Iterator[bool]:
        """Do one step; if it fails, say so and continue with the next one.

        Args:
            name: Of the step, in its row.
            need: Seconds that it takes: with less left the value is False, and the row says so.
        """
        if self.left < need and not self.dry:
            self.add("skipped", step=name, why=f"{self.left:.0f} s are left, it needs {need:.0f}")
            yield False
            return
        try:
            yield True
        except Exception as error:  # a library can fail in any way; measure the others
            self.add("failed", step=name, why=one_line(error))
        gc.collect()
        self._require_context(name)

    def _require_context(self, name: str) -> None:
        """End the part if the CUDA context is lost: every call after it would fail, too."""
        if why := self.context_error(self.device):
            self.add("context lost", step=name, why=why)
            self.give_up(LOST)
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def earlier(self, part: str, row: str) -> list[Row]:
        """Return the rows of a kind that another part has written."""
        rows = read_log(self.log)
        return [each for each in rows if (each["part"], each["row"]) == (part, row)]


def read_log(path: Path) -> list[Row]:
    """Return all rows so far; a line that was being written when its process was killed is left."""
    rows = []
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def smaller_speedups(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """Return the speedups of `speedups` rows by device and key of the policy, and by backend.

    Of a shape that was measured twice, against cuBLAS and against max-autotune, the smaller counts.
    """
    table: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        ratios = table.setdefault((row["device"], row["key"]), {})
        for name, ratio in row["ratios"].items():
            ratios[name] = round(min(ratio, ratios.get(name, ratio)), 4)
    return table


def one_line(error: BaseException) -> str:
    """Return an exception as one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:300].removesuffix(": ")
