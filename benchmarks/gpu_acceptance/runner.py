"""Run the parts one after the other, each in a process with a time limit; write after each row.

No torch is imported here: a CUDA error of a part cannot reach this process.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_acceptance.plan import BUDGET, LEAST, Part
from benchmarks.gpu_acceptance.record import LOST, read_log

FORMAT = 1
CHILD = (sys.executable, "-m", "benchmarks.gpu_acceptance.child")
_DRY = 4
_GRACE = 3.0  # seconds that a part has to end by itself before its limit
ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """One run of all parts.

    Attributes:
        path: The JSON that is written, after each row.
        dry: Whether the parts run tiny sizes, and measure no speed.
        budget: Seconds of the whole run.
        child: The command of a part's process.
        say: Prints progress.
    """

    path: Path
    dry: bool = False
    budget: float = BUDGET
    child: Sequence[str] = CHILD
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    document: dict[str, Any] = field(default_factory=dict)
    _start: float = field(default_factory=time.perf_counter)

    @property
    def log(self) -> Path:
        """The rows as they are measured, one JSON object a line."""
        return self.path.with_suffix(".rows.jsonl")

    @property
    def left(self) -> float:
        """Seconds that are left of the budget."""
        return self.budget - (time.perf_counter() - self._start)

    def parts(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Run the parts; return the document."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.document = {
            "format": FORMAT,
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "dry": self.dry,
            "budget": self.budget,
            "seconds": 0.0,
            "parts": [
                {"name": part.name, "title": part.title, "limit": part.seconds}
                | {"state": "not run", "why": "", "seconds": 0.0, "rows": []}
                for part in parts
            ],
        }
        for part, entry in zip(parts, self.document["parts"], strict=True):
            if fatal := self._fatal():
                entry["why"] = fatal
            elif self.left < LEAST:
                entry["why"] = "no time left in the budget"
            else:
                self._part(part, entry)
            self.write()
            tail = f" ({entry['why']})" if entry["why"] else ""
            passed = time.perf_counter() - self._start
            self.say(f"{passed:5.0f} s  {part.name}: {entry['state']}{tail}")
        self.log.unlink(missing_ok=True)
        return self.document

    def write(self) -> None:
        """Write the document with all rows so far; a reader never sees a half of it."""
        rows = read_log(self.log)
        for entry in self.document["parts"]:
            entry["rows"] = [
                {key: value for key, value in row.items() if key != "part"}
                for row in rows
                if row["part"] == entry["name"]
            ]
        self.document["seconds"] = round(time.perf_counter() - self._start, 1)
        half = self.path.with_suffix(".part")
        half.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        half.replace(self.path)

    def _fatal(self) -> str:
        """Return why no part can run: the first one has found no GPU, for example."""
        rows = [row for entry in self.document["parts"] for row in entry["rows"]]
        return next((row["why"] for row in rows if row["row"] == "problem" and row["fatal"]), "")

    def _part(self, part: Part, entry: dict[str, Any]) -> None:
        """Run one part, and say how it ended."""
        # a dry run measures no speed, and may share the CPU with other work
        limit = min(part.seconds * (_DRY if self.dry else 1), self.left)
        words = [
            *self.child,
            part.name,
            part.target,
            str(self.log.resolve()),
            f"{limit - _GRACE:.1f}",
        ]
        words += ["--dry"] if self.dry else []
        start = time.perf_counter()
        errors = self.path.with_suffix(".errors")
        with errors.open("wb") as stderr:
            # A session of its own: with the part end all processes that it has started.
            process = subprocess.Popen(
                words, stdout=stderr, stderr=stderr, stdin=subprocess.DEVNULL, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
            status = self._wait(process, until=start + limit)
        entry["seconds"] = round(time.perf_counter() - start, 1)
        last = _last_line(errors)
        errors.unlink()
        if status is None:
            entry |= {"state": "out of time", "why": f"stopped after {limit:.0f} s"}
        elif status == LOST:
            lost = [row for row in read_log(self.log) if row["row"] == "context lost"]
            entry |= {"state": "context lost", "why": lost[-1]["why"] if lost else last}
        elif status:
            ended = f"signal {-status}" if status < 0 else f"status {status}"
            entry |= {"state": "crashed", "why": f"{ended}: {last}" if last else ended}
        else:
            entry |= {"state": "done", "why": ""}

    def _wait(self, process: subprocess.Popen[bytes], *, until: float) -> int | None:
        """Wait for a part, and write its rows meanwhile; None if it was stopped at its limit."""
        size = -1
        try:
            while (left := until - time.perf_counter()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(0.5, left))
                now = self.log.stat().st_size if self.log.is_file() else 0
                if now != size:
                    size = now
                    self.write()
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that hangs in the driver may not die: the run goes on without it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


def _last_line(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
