"""Timing that can be believed: interleaved, cold, in CUDA graphs, ratios inside one run.

1. Rivals take turns, block after block, in one process: a change of clocks hits all of them.
2. Every call in a block uses other weights than the one before; together they are larger than
   the cache of any chip, so that weights come from memory.
3. Calls are captured in a CUDA graph and replayed: the host's time is not in the numbers.
4. What is reported is the median of the blocks' ratios, with the smallest and the largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

COLD_BYTES = 512 << 20
"""Distinct weights in one turn: at least four times the L2 cache of an H200 (60 MB)."""

BLOCKS = 5
Call = Callable[[], object]


class Clock(Protocol):
    """Times calls that are made one after the other."""

    measures_speed: bool

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Return something that makes all calls once; it may capture them."""

    def seconds(self, turn: Call, repeats: int) -> float:
        """Return the seconds of so many turns."""


class GraphClock:
    """Captures calls in a CUDA graph, and times replays with events of the device."""

    measures_speed = True

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Warm up on a side stream, then capture."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, turn: Call, repeats: int) -> float:
        """Time replays between two events."""
        begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begun.record()
        for _ in range(repeats):
            turn()
        ended.record()
        torch.cuda.synchronize()
        return float(begun.elapsed_time(ended)) / 1000


class EagerClock(GraphClock):
    """Times calls as Python makes them: bound by launches where kernels are short."""

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Make the calls as they are."""

        def turn() -> None:
            for call in calls:
                call()

        return turn


class DryClock:
    """Makes the calls on a CPU and gives no speed: a CPU says nothing of 2:4 on a GPU."""

    measures_speed = False

    def prepare(self, calls: Sequence[Call]) -> Call:
        """Make the calls as they are."""
        return EagerClock().prepare(calls)

    def seconds(self, turn: Call, repeats: int) -> float:
        """Return the host's seconds; only their order of magnitude is used."""
        begun = time.perf_counter()
        turn()
        return time.perf_counter() - begun


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return GraphClock() if device.type == "cuda" else DryClock()


@dataclass(frozen=True)
class Timings:
    """Seconds a call of each rival, a value a block, all of one run."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median over the blocks."""
        return statistics.median(self.seconds[name])

    def fastest(self, names: Sequence[str]) -> str:
        """Return which of the rivals has the smallest median."""
        return min(names, key=self.median)

    def ratio(self, baseline: str, name: str) -> Ratio:
        """Return how many times faster than the baseline a rival was, block by block."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        each = [slow / fast for slow, fast in pairs]
        return Ratio(statistics.median(each), min(each), max(each), len(each))


@dataclass(frozen=True)
class Ratio:
    """Baseline time over time: above 1 is faster. Median, smallest and largest of the blocks."""

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
) -> Timings:
    """Time rivals in turns.

    Args:
        rivals: For each its calls, one a copy of the weights.
        clock: Prepares and times them.
        blocks: Turns of every rival that count; one more is thrown away.
        block_seconds: About how long a turn should take; a turn makes every call at least once.
    """
    turns = {name: clock.prepare(calls) for name, calls in rivals.items()}
    repeats = {
        name: max(1, min(1000, round(block_seconds / max(clock.seconds(turn, 1), 1e-7))))
        for name, turn in turns.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for block in range(blocks + 1):
        for name, turn in turns.items():
            took = clock.seconds(turn, repeats[name])
            calls = len(rivals[name]) * (repeats[name] if clock.measures_speed else 1)
            if block:
                seconds[name].append(took / calls)
    return Timings(seconds)
