"""Figures of the packed 2:4 format, on one core."""

from __future__ import annotations

import time

from benchmarks.figures import THREADS, Figure, at_most, figure, noted

ROWS, WIDTH = 4096, 11008


@figure("pack24")
def pack24_figures() -> list[Figure]:
    """Check, pack and unpack a 4096 x 11008 matrix of bfloat16: seconds of one core's time."""
    import torch

    from prunebench.sparse24.packed import check_24, pack24, unpack24

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(ROWS, WIDTH // 4, 4, generator=generator).argsort(-1)[..., :2]
    keep = torch.zeros(ROWS, WIDTH // 4, 4, dtype=torch.bool).scatter_(-1, places, True)
    dense = torch.randn(ROWS, WIDTH, generator=generator).to(torch.bfloat16)
    weight = torch.where(keep.view(ROWS, WIDTH), dense, 0)
    runs: dict[str, list[float]] = {"check24": [], "pack24": [], "unpack24": [], "copy": []}
    for attempt in range(6):
        marks = [time.process_time()]
        check_24(weight)
        marks.append(time.process_time())
        packed = pack24(weight)
        marks.append(time.process_time())
        back = unpack24(packed)
        marks.append(time.process_time())
        weight.clone()
        marks.append(time.process_time())
        if not torch.equal(back, weight):
            raise AssertionError("the round trip is not exact")
        if attempt:
            for name, start_time, ended in zip(runs, marks, marks[1:], strict=False):
                runs[name].append(ended - start_time)
    torch.set_num_threads(THREADS)
    unit = f"s for {ROWS} x {WIDTH}, one core"
    return [
        at_most("check24", 1.0, unit, runs["check24"]),
        at_most("pack24", 1.0, unit, runs["pack24"]),
        at_most("unpack24", 1.0, unit, runs["unpack24"]),
        noted("copy-of-the-same", unit, runs["copy"]),
        at_most("packed24-bytes", 0.5625, "of the dense bytes", [packed.bytes / weight.nbytes]),
    ]
