"""Reliable timing: interleaved, with cold caches, in CUDA graphs, ratios within one run.

1. Rivals take turns, block by block, in one process: a change of clocks affects all of them.
2. Consecutive calls in a block use different weights, together larger than the L2 cache of any GPU,
   so that weights are read from memory.
3. Calls are captured in a CUDA graph and replayed: launch overhead is not included.
4. The reported ratio is the median over the blocks, with the smallest and the largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

COLD_BYTES = 512 << 20
"""Distinct weights in one turn: at least four times the L2 cache of an H200 (60 MB)."""

BLOCKS = 5
Call = Callable[[], object]


class Clock(Protocol):
    """Measures the time of consecutive calls."""

    measures_speed: bool

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Return a turn: a function that makes all calls once, possibly a captured graph."""

    def seconds(self, turn: Call, repeats: int) -> float:
        """Return the seconds of `repeats` turns."""


class GraphClock:
    """Captures calls in a CUDA graph and measures replays with CUDA events."""

    measures_speed = True

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Warm up on a side stream, then capture."""
        # Lazy initialization, autotuning and allocations are not allowed in a capture: they happen
        # here.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Captured, not run: the memory that the calls use belongs to the graph from here on.
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, turn: Call, repeats: int) -> float:
        """Measure the replays between two events."""
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # One pair of events around all repeats: the device's time, with no wait for it in between.
        start.record()
        for _ in range(repeats):
            turn()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000  # from milliseconds


class EagerClock(GraphClock):
    """Measures calls from Python: dominated by launch overhead if kernels are short."""

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Return a function that makes the calls eagerly."""

        def turn() -> None:
            for call in calls:
                call()

        return turn


class DryClock:
    """Makes the calls on a CPU without measuring speed: it would say nothing about a GPU."""

    measures_speed = False

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Return a function that makes the calls eagerly."""
        return EagerClock().prepare(calls)

    def seconds(self, turn: Call, repeats: int) -> float:
        """Return the host's seconds; only their order of magnitude is used."""
        start_time = time.perf_counter()
        turn()
        return time.perf_counter() - start_time


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return GraphClock() if device.type == "cuda" else DryClock()


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each rival, one value per block, all of one run.

    Attributes:
        failed: Optional rivals that could not be measured, with the reason.
    """

    seconds: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Return the median over the blocks."""
        return statistics.median(self.seconds[name])

    def fastest(self, names: Sequence[str]) -> str:
        """Return the rival with the smallest median."""
        return min(names, key=self.median)

    def ratio(self, baseline: str, name: str) -> Ratio:
        """Return the speedup of a rival over the baseline, computed block by block."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        # Block by block: the two times of a block are neighbors, so drifting clocks cancel out.
        each = [slow / fast for slow, fast in pairs]
        return Ratio(statistics.median(each), min(each), max(each), len(each))


@dataclass(frozen=True)
class Ratio:
    """Speedup, above 1 is faster: median, smallest and largest over the blocks."""

    median: float
    low: float
    high: float
    blocks: int


def interleaved(
    rivals: Mapping[str, Sequence[Call]],
    clock: Clock,
    *,
    blocks: int = BLOCKS,
    block_seconds: float = 0.01,
    optional: Collection[str] = (),
) -> Timings:
    """Measure rivals in turns.

    Args:
        rivals: The calls of each rival, one per copy of the weights.
        clock: Prepares and measures them.
        blocks: Measured blocks; one more is run first as a warm-up.
        block_seconds: Approximate duration of a block; every call is made at least once.
        optional: Rivals that are left out, with the reason, if they cannot be prepared: compiled,
            captured in a graph, or run at all. A failure of another one is raised.
    """
    turns: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, calls in rivals.items():
        try:
            turns[name] = clock.prepare(calls)
        except Exception as error:  # a library can fail in any way; measure the others
            if name not in optional:
                raise
            failed[name] = reason_of(error)
    repeats = {
        # From one turn: enough repeats that a block lasts about `block_seconds`.
        name: max(1, min(1000, round(block_seconds / max(clock.seconds(turn, 1), 1e-7))))
        for name, turn in turns.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for block in range(blocks + 1):
        for name, turn in turns.items():
            took = clock.seconds(turn, repeats[name])
            # `DryClock` runs a turn once, whatever the repeats.
            calls = len(rivals[name]) * (repeats[name] if clock.measures_speed else 1)
            # Block 0 is the warm-up.
            if block:
                seconds[name].append(took / calls)
    return Timings(seconds, failed)


def reason_of(error: Exception) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
