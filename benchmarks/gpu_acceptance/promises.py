"""What the project promises on a GPU: one table, and what a run says of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Document = dict[str, Any]
Row = dict[str, Any]
MENDED_LIBRARY = 801
"""cuSPARSELt 0.8.1: 0.8.0 is known to be slow on Hopper."""


@dataclass(frozen=True)
class Promise:
    """One figure that must be reached.

    Attributes:
        name: Short, unique.
        title: What is measured, with its unit.
        part: Which part measures it.
        goal: Which side of the limit is right.
        limit: The promised figure.
        measured: Returns the figure of a document; None if it was not measured.
        chip: The GPU for which it is promised; "" for all.
        library: Oldest cuSPARSELt with which it is promised; 0 for any, or none.
    """

    name: str
    title: str
    part: str
    goal: Literal["at least", "at most"]
    limit: float
    measured: Callable[[Document], float | None]
    chip: str = "H200"
    library: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a run says of a promise: `held`, `NOT HELD`, `not measured` or `not promised`."""

    promise: Promise
    measured: float | None
    state: Literal["held", "NOT HELD", "not measured", "not promised"]
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """What was measured over what is promised."""
        return None if self.measured is None else self.measured / (self.promise.limit or 1.0)


def rows_of(document: Document, part: str, kind: str, **match: Any) -> Iterator[Row]:
    """Yield the rows of a kind in a part whose fields have these values."""
    for entry in document.get("parts", []):
        for row in entry["rows"] if entry["name"] == part else []:
            if row["row"] == kind and all(row.get(key) == value for key, value in match.items()):
                yield row


def _value(parts: str, kind: str, field: str, **match: Any) -> Callable[[Document], float | None]:
    """Return a function that reads one field in the rows of some parts, separated by spaces.

    A shape that was measured again, against max-autotune too, counts with its smaller figure.
    """

    def read(document: Document) -> float | None:
        values = []
        for part in parts.split():
            for row in rows_of(document, part, kind, **match):
                value: Any = row
                for name in field.split("."):
                    value = value.get(name) if isinstance(value, dict) else None
                if value is not None:
                    values.append(float(value))
        return min(values, default=None)

    return read


def _layer(rows: int, width: int, tokens: int, limit: float, *, library: int = 0) -> Promise:
    shape = {"rows": rows, "width": width, "tokens": tokens, "tile_rows": None}
    return Promise(
        f"layer-{rows}x{width}-{tokens}",
        f"{rows} x {width}, {tokens:,} token{'s' * (tokens > 1)}, speedup",
        "decode" if tokens == 1 else "prefill", "at least", limit,
        _value("decode prefill", "layer", "as_used", **shape), library=library,
    )  # fmt: skip


def _share(part: str, kind: str, field: str) -> Callable[[Document], float | None]:
    """Return a function that computes the share of rows whose field is true."""

    def read(document: Document) -> float | None:
        values = [row[field] for row in rows_of(document, part, kind) if row[field] is not None]
        return statistics.fmean(map(bool, values)) if values else None

    return read


def _pruning(method: str, sparsity: str, limit: float) -> Promise:
    return Promise(
        f"prune-{method}-{sparsity.replace(':', 'of')}",
        f"LLaMA-2-7B, {method} {sparsity}, seconds",
        "pruning", "at most", limit,
        _value("pruning", "pruning", "of_all_blocks", method=method, sparsity=sparsity),
    )  # fmt: skip


PROMISES = (
    Promise("correct", "CPU = GPU, share of the checks", "correct", "at least", 1.0,
            _share("correct", "check", "holds"), chip=""),
    Promise("capture", "backends in a CUDA graph, share", "capture", "at least", 1.0,
            _share("capture", "capture", "works"), chip=""),
    Promise("numerics", "layers with right numbers, share", "decode", "at least", 1.0,
            _share("decode", "layer", "numerics_hold"), chip=""),
    _layer(11008, 4096, 1, 1.45),
    _layer(4096, 11008, 1, 1.45),
    _layer(4096, 4096, 1, 1.30),
    _layer(12288, 4096, 1, 1.50),
    _layer(22016, 4096, 1, 1.50),
    _layer(12288, 12288, 1, 1.60),
    Promise("decode", "LLaMA-2-7B, decode, speedup", "end-to-end", "at least", 1.38,
            _value("end-to-end", "case", "ratio.median", case="decode", batch=1, context=128)),
    _layer(11008, 4096, 2048, 1.30, library=MENDED_LIBRARY),
    Promise("prefill", "LLaMA-2-7B, prefill 2,048, speedup", "end-to-end", "at least", 1.20,
            _value("end-to-end", "case", "ratio.median", case="prefill", batch=1, context=2048,
                   storage="speed"), library=MENDED_LIBRARY),
    Promise("resident", "LLaMA-2-7B, resident, of dense", "end-to-end", "at most", 0.585,
            _value("end-to-end", "model", "resident"), chip=""),
    _pruning("wanda", "2:4", 90),
    _pruning("sparsegpt", "2:4", 300),
    _pruning("sparsegpt", "0.5", 300),
    Promise("maskllm", "MaskLLM, 32 windows, of dense", "maskllm", "at most", 1.25,
            _value("maskllm", "step", "of_a_dense_step", variant="fp32", windows=[32, 4096])),
    Promise("disk", "losses from disk are equal", "memory", "at least", 1.0,
            _share("memory", "disk", "same"), chip=""),
    Promise("halving", "masks of halved batches, equal", "memory", "at least",
            1.0, _value("memory", "halving", "same_masks"), chip=""),
)  # fmt: skip
"""On an H200 where nothing else is said; ratios are taken in one run."""


def verdicts(document: Document) -> list[Verdict]:
    """Return what a run says of every promise."""
    return [_verdict(promise, document) for promise in PROMISES]


def failures(document: Document) -> list[Verdict]:
    """Return the promises that a run has found not to be kept."""
    return [verdict for verdict in verdicts(document) if verdict.state == "NOT HELD"]


def environment_of(document: Document) -> Row:
    """Return what the first part says of the machine; empty if it has not got so far."""
    return next(rows_of(document, "machine", "environment"), {})


def _verdict(promise: Promise, document: Document) -> Verdict:
    if document["dry"]:
        return Verdict(promise, None, "not measured", "a dry run")
    value = promise.measured(document)
    if value is None:
        return Verdict(promise, None, "not measured", _why_not(promise, document))
    machine = environment_of(document)
    gpu, library = str(machine.get("gpu")), machine.get("cusparselt") or 0
    if promise.chip not in gpu:
        return Verdict(promise, value, "not promised", f"for {promise.chip} only")
    if library < promise.library:
        why = f"from cuSPARSELt {promise.library} on; this is {library or 'none'}"
        return Verdict(promise, value, "not promised", why)
    held = value >= promise.limit if promise.goal == "at least" else value <= promise.limit
    return Verdict(promise, value, "held" if held else "NOT HELD")


def _why_not(promise: Promise, document: Document) -> str:
    """Return why a figure is missing: how its part ended, or what failed in it."""
    entry = next((each for each in document["parts"] if each["name"] == promise.part), None)
    if entry is None:
        return "its part was not asked for"
    if entry["state"] != "done":
        return f"{entry['state']}: {entry['why']}".removesuffix(": ")
    steps = [row for row in entry["rows"] if row["row"] in ("failed", "skipped")]
    return f"{steps[0]['step']}: {steps[0]['why']}" if steps else ""
