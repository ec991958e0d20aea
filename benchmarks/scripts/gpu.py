"""`make bench-gpu`: every promised figure of 2:4 on one GPU, in one process of under ten minutes.

    python -m benchmarks.scripts.gpu -o gpu.json          on a GPU; random weights, the right shapes
    python -m benchmarks.scripts.gpu --dry -o gpu.json    on a CPU: the same path, tiny, no speed
    python -m benchmarks.scripts.gpu_report gpu.json      the table (make bench-gpu-report)

It needs torch and what prunebench's packed layers import; no lm-eval, no datasets, no network.
Numbers are checked in the same run. The JSON is written after every part, so that a run that is cut
off has what it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fixtures.shaped import (
    LLAMA2_7B,
    TINY,
    Decoder,
    Shape,
    Weights,
    dense_bytes,
    stored_bytes,
)
from prunebench.bench.environment import clocks, environment
from prunebench.bench.layers import NOT_MEASURED, LayerBench, LayerResult, autotuned_dense
from prunebench.bench.shapes import CROSSOVER_TOKENS, SHAPES, TOKENS, LayerShape
from prunebench.bench.timing import Clock, EagerClock, Timings, clock_for, interleaved
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.backends.triton import Launch
from prunebench.sparse24.buckets import bucket_of
from prunebench.sparse24.policy import Policy, device_key

BUDGET_SECONDS = 540.0
_AUTOTUNE_SHARE = 0.55  # of the budget: after it, dense cells compete with cuBLAS only, and say so
_LAYERS_SHARE = 0.70
# (rows of a tile, launch)
_SWEEP = tuple(
    (rows, Launch(parts, warps, stages))
    for rows in (8, 16, 32)
    for parts, warps in ((2, 4), (4, 4), (8, 8))
    for stages in (2, 3)
)
_DRY_SHAPES = (LayerShape("tiny", "square", 64, 256), LayerShape("tiny", "wide", 96, 512))
_STEPS = 8


@dataclass
class Report:
    """What is written: parts in the order in which they are measured."""

    path: Path
    started: float = field(default_factory=time.perf_counter)
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    def add(self, part: str, value: Any) -> None:
        """Put a part in, and write what there is."""
        self.document[part] = value
        self.document["seconds"] = round(self.seconds, 1)
        text = json.dumps(self.document, indent=1, default=str)
        self.path.write_text(text + "\n", encoding="utf-8")
        print(f"{self.seconds:6.0f} s  {part}", file=sys.stderr, flush=True)

    def within(self, share: float) -> bool:
        """Whether less than a share of the time is gone."""
        return self.seconds < share * BUDGET_SECONDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns 1 if a number is wrong, 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.scripts.gpu", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/gpu.json"))
    parser.add_argument("--dry", action="store_true", help="the same path on a CPU, tiny, no speed")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print(f"speed: {NOT_MEASURED}; --dry runs the path without one", file=sys.stderr)
        return 3
    device = torch.device("cpu" if options.dry else "cuda")
    report = Report(options.output)
    report.add("environment", environment(device) | {"dry": options.dry})
    report.add("clocks_before", clocks(device))
    report.add("speed", NOT_MEASURED if options.dry else "measured")
    clock = clock_for(device)
    policy = Policy(device, speed=True)
    report.add("capture", _guarded(lambda: _capture(device, policy)))
    report.add("sweep", _guarded(lambda: _sweep(device, policy, clock, report)))
    rows = _layers(device, policy, clock, report)
    shape = TINY if options.dry else LLAMA2_7B
    report.add("model", _guarded(lambda: _model(shape, device, clock, policy)))
    report.add("clocks_after", clocks(device))
    wrong = [row for row in rows if not row.get("numerics_hold", True)]
    for row in wrong:
        print(f"wrong numbers: {row['rows']} x {row['width']}, {row['tokens']}", file=sys.stderr)
    return 1 if wrong or "error" in report.document["model"] else 0


def _guarded(work: Callable[[], Any]) -> Any:
    """Do a part; one that fails says why, and the others go on."""
    try:
        return work()
    except Exception as error:  # whatever a library does, the report is written
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()
        # After an error that destroys the context this fails, too: the report is what counts.
        with contextlib.suppress(RuntimeError):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _bench(
    shape: LayerShape, device: torch.device, policy: Policy, clock: Clock, **options: Any
) -> LayerBench:
    if device.type != "cuda":
        options["cold_bytes"] = 2 * shape.dense_bytes
    return LayerBench(shape, device, torch.bfloat16, policy, clock, **options)


def _capture(device: torch.device, policy: Policy) -> dict[str, str]:
    """Say for every backend whether it can be captured in a CUDA graph, and what it answers."""
    states = {}
    shape = LayerShape("probe", "square", 1024, 1024) if device.type == "cuda" else _DRY_SHAPES[0]
    for tokens in (1, 2048) if device.type == "cuda" else (1, 80):
        row = _bench(shape, device, policy, clock_for(device)).measure(tokens, blocks=1)
        for name in ("triton", "cslt", "decompress", "reference"):
            done = name in row.errors
            states[f"{name}, {tokens} tokens"] = (
                "works" if done else row.refused.get(name, "unused")
            )
    return states


def _sweep(
    device: torch.device, policy: Policy, clock: Clock, report: Report
) -> list[dict[str, Any]]:
    """Try other tiles and launches of the decode kernel on two shapes, for one token."""
    rows: list[dict[str, Any]] = []
    shapes = _DRY_SHAPES[:1] if device.type == "cpu" else (SHAPES[0], SHAPES[4])
    if not policy.verdicts((4096, 4096), torch.bfloat16, 1)["triton"].ok:
        return rows
    for shape in shapes:
        for tile in dict.fromkeys(tile for tile, _ in _SWEEP):
            launches = [launch for candidate, launch in _SWEEP if candidate == tile]
            bench = _bench(shape, device, policy, clock, tile_rows=tile, launches=launches)
            row = bench.measure(1, blocks=3)
            for number, launch in enumerate(launches):
                name = f"triton#{number}"
                rows.append(
                    {"rows": shape.rows, "width": shape.width, "error": row.errors.get(name)}
                    | {"tile_rows": tile, "launch": asdict(launch)}
                    | {"ratio": row.ratios.get(name), "seconds": row.seconds.get(name)}
                )
            if not report.within(0.2):
                return rows
    return rows


def _best_launches(sweep: Any, shape: LayerShape) -> tuple[int, list[Launch]]:
    """Return the tiles that were fastest on the nearest shape of the sweep, with their launches."""
    rows = [row for row in sweep if row.get("seconds")] if isinstance(sweep, list) else []
    if not rows:
        return 16, []
    small = shape.dense_bytes <= SHAPES[0].dense_bytes
    near = [row for row in rows if (row["rows"] * row["width"] <= 4096 * 4096) == small] or rows
    best = min(near, key=lambda row: row["seconds"])
    tile = best["tile_rows"]
    launches = {Launch(**row["launch"]) for row in near if row["tile_rows"] == tile}
    return tile, sorted(launches, key=str)


def _layers(
    device: torch.device, policy: Policy, clock: Clock, report: Report
) -> list[dict[str, Any]]:
    """Measure every shape for every number of tokens, one token first, while there is time."""
    rows: list[dict[str, Any]] = []
    shapes = _DRY_SHAPES if device.type == "cpu" else SHAPES
    counts = (1, 8, 80) if device.type == "cpu" else TOKENS
    cells = [(shape, tokens) for tokens in counts for shape in shapes]
    if device.type == "cuda":
        cells += [(SHAPES[4], tokens) for tokens in CROSSOVER_TOKENS]
    for shape, tokens in cells:
        cell = {"model": shape.model, "layer": shape.name, "rows": shape.rows}
        cell |= {"width": shape.width, "tokens": tokens}
        if not report.within(_LAYERS_SHARE):
            rows.append(cell | {"skipped": "no time left in the budget"})
            continue
        tune = device.type == "cuda" and report.within(_AUTOTUNE_SHARE)
        tile, launches = _best_launches(report.document.get("sweep"), shape)
        bench = _bench(
            shape, device, policy, clock, tile_rows=tile, launches=launches if tokens <= 4 else (),
            compile_dense=autotuned_dense if tune else None,
        )  # fmt: skip
        measured = _guarded(partial(bench.measure, tokens))
        if not isinstance(measured, LayerResult):
            rows.append(cell | {"skipped": measured["error"]})
            continue
        _remember(policy, measured)
        measured_row = measured.to_dict()
        if device.type == "cuda" and tokens <= 8 and report.within(_AUTOTUNE_SHARE):
            measured_row["eager_ratio"] = _eager(shape, device, policy, tokens)
        rows.append(measured_row | {"dense_kinds": ["cublas"] + (["max-autotune"] if tune else [])})
        report.add("layers", rows)
    report.add("layers", rows)
    if device.type == "cuda":
        report.add("policy", {"device": device_key(device), "measured": policy.table})
    return rows


def _remember(policy: Policy, row: LayerResult) -> None:
    """Let the policy choose by what was measured: for the whole model, and in the report."""
    if row.dense:
        rivals = {name: row.seconds[name] for name in backends() if name in row.seconds}
        seconds = {"dense": row.seconds[row.dense], **rivals}
        policy.remember((row.rows, row.width), torch.bfloat16, bucket_of(row.tokens), seconds)


def _eager(shape: LayerShape, device: torch.device, policy: Policy, tokens: int) -> float | None:
    """Return the ratio without CUDA graphs, which is bound by launches."""
    row = _guarded(lambda: _bench(shape, device, policy, EagerClock()).measure(tokens, blocks=3))
    return row.ratio.median if getattr(row, "ratio", None) else None


def _model(shape: Shape, device: torch.device, clock: Clock, policy: Policy) -> dict[str, Any]:
    """Prefill and decode of a whole decoder, dense and packed in turns, and the same tokens."""
    weights = Weights(shape, device=device, dtype=torch.bfloat16)
    sides = {
        "dense": weights.dense_blocks(),
        "packed": weights.packed_blocks(Policy(device, table=policy.table)),  # one layout: 0.5625
    }
    document: dict[str, Any] = {
        "shape": asdict(shape),
        "dense_bytes": dense_bytes(weights),
        "stored_bytes": stored_bytes(weights, sides["packed"]),
        "cases": [],
    }
    document["resident_ratio"] = document["stored_bytes"] / document["dense_bytes"]
    document |= _same(weights, sides)
    dry = not clock.measures_speed
    for batch, context in ((1, 16), (2, 16)) if dry else ((1, 128), (1, 2048), (8, 128), (64, 128)):
        document["cases"].append(_decode(weights, sides, clock, batch=batch, context=context))
    for batch, prompt in ((1, 16),) if dry else ((1, 512), (1, 2048), (8, 2048)):
        document["cases"].append(_prefill(weights, sides, clock, batch=batch, prompt=prompt))
    if not dry:
        del sides["packed"]
        fast = {"dense": sides["dense"], "packed": weights.packed_blocks(policy)}
        case = _prefill(weights, fast, clock, batch=1, prompt=2048)
        document["cases"].append(case | {"storage": "speed"})
        document["stored_bytes_speed"] = stored_bytes(weights, fast["packed"])
    return document


def _ids(weights: Weights, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(weights.shape.vocabulary, (batch, length), generator=generator)
    return ids.to(weights.device)


def _same(weights: Weights, sides: dict[str, Any]) -> dict[str, Any]:
    """Compare logits and greedy tokens of both sides."""
    logits, tokens = {}, {}
    for name, blocks in sides.items():
        decoder = Decoder(weights, blocks, batch=1, room=64)
        logits[name] = decoder.prefill(_ids(weights, 1, 32)).float()
        made = []
        for _ in range(16):
            made.append(int(decoder.token[0, 0]))
            decoder.step()
        tokens[name] = made
    error = (logits["packed"] - logits["dense"]).norm() / logits["dense"].norm()
    same = sum(a == b for a, b in zip(tokens["dense"], tokens["packed"], strict=True)) / 16
    return {"logits_error": float(error), "same_greedy_tokens": same}


def _decode(
    weights: Weights, sides: dict[str, Any], clock: Clock, *, batch: int, context: int
) -> dict[str, Any]:
    calls = {}
    for name, blocks in sides.items():
        decoder = Decoder(weights, blocks, batch=batch, room=context + _STEPS)
        decoder.prefill(_ids(weights, batch, context))
        calls[name] = [_steps(decoder, context)]
    return _case("decode", batch, context, calls, clock, tokens=batch * _STEPS)


def _steps(decoder: Decoder, start: int) -> Callable[[], None]:
    def steps() -> None:  # from the same place every time
        decoder.position.fill_(start)
        for _ in range(_STEPS):
            decoder.step()

    return steps


def _prefill(
    weights: Weights, sides: dict[str, Any], clock: Clock, *, batch: int, prompt: int
) -> dict[str, Any]:
    ids = _ids(weights, batch, prompt)
    calls = {}
    for name, blocks in sides.items():
        decoder = Decoder(weights, blocks, batch=batch, room=prompt)
        calls[name] = [lambda decoder=decoder: decoder.prefill(ids)]
    return _case("prefill", batch, prompt, calls, clock, tokens=None)


def _case(
    case: str, batch: int, context: int, calls: dict[str, Any], clock: Clock, *, tokens: int | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case, "batch": batch, "context": context}
    if clock.measures_speed:
        torch.cuda.reset_peak_memory_stats()
    try:
        timings = interleaved(calls, clock, blocks=5 if clock.measures_speed else 1)
    except RuntimeError as error:
        return row | {"skipped": f"{type(error).__name__}: {error}"[:300]}
    if not clock.measures_speed:
        return row | {"ratio": None}
    return row | _figures(timings, tokens) | {"peak_bytes": torch.cuda.max_memory_allocated()}


def _figures(timings: Timings, tokens: int | None) -> dict[str, Any]:
    packed = timings.median("packed")
    return {
        "ratio": asdict(timings.ratio("dense", "packed")),
        "dense_seconds": timings.median("dense"),
        "packed_seconds": packed,
        "tokens_per_second": tokens / packed if tokens else None,
    }


if __name__ == "__main__":
    sys.exit(main())
