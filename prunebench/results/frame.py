"""Results as data: a pandas table with one row a score.

    import prunebench
    df = prunebench.load_results("results", ["method=wanda,sparsegpt"])
    df[df.newest].groupby(["sparsity", "method"]).value.mean()

The comparison, `TABLE.md` and the report are made from this table.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunebench.options import options_of
from prunebench.results.bench_schema import Bench, read_benches
from prunebench.results.schema import Result, Score
from prunebench.results.selection import (
    OPTION,
    Selection,
    nothing_selected,
    options_of_result,
    without_seeds,
)
from prunebench.results.sizes import size_of, target_of
from prunebench.results.store import ResultStore
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec

if TYPE_CHECKING:
    from pandas import DataFrame, Series

_OPTIONS = options_of(RunSpec)
CELL_OPTIONS = tuple(name for name, option in _OPTIONS.items() if option.about.cell)
_NOT_OF_A_CELL = set(_OPTIONS) - set(CELL_OPTIONS)
_SCORES = (
    "metric", "dataset", "protocol", "value", "stderr", "dense", "dense_stderr", "ratio_to_dense",
    "higher_is_better", "limited", "targets", "tokens_sha256", "member_of",
    "newest",
)  # fmt: skip

_REPEATED = ["cell", "metric", "protocol", "tokens_sha256", "seed", "option_seeds"]
_PARTS = ("method_options", "allocation_options", "recover_options")


def load_results(folder: str | Path = "results", selectors: Sequence[str] = ()) -> DataFrame:
    """Read the results of a folder into a table, one row a score, oldest run first.

    Columns:
        cell: What a row of `compare` is: a hash of the spec without its seed and its evaluation.
        result_id, created_at (UTC), prunebench (the version that measured it).
        method, model, model_revision, dtype, sparsity, allocation, within_block, calibration, ...:
            Every option of a run that tells cells apart, named as in a recipe; missing where a
            method has no use for it. `method_options` and `allocation_options` are JSON.
        set.NAME, set.allocation.NAME: Those options one by one, as selectors name them; text where
            the values are of several kinds.
        seed: Of the run; what a cell is folded over.
        option_seeds: The seeds of its parts that are not the run's, as JSON; a cell is folded over
            them too.
        metric, dataset, protocol: What was measured. Two protocols are never to be compared.
        value, stderr, dense, dense_stderr: Of the pruned and of the dense model.
        ratio_to_dense: `value / dense`; missing where dense is 0.
        higher_is_better, limited (only a part of the data was scored), targets (tokens, documents).
        tokens_sha256: Hash of what was scored. Where it differs under one protocol, as with two
            tokenizers, values are not to be compared either.
        member_of: The group of tasks that a score is a part of; empty where there is none.
        newest: False where a later run repeated this cell, with these seeds, metric and protocol,
            on the same tokens; a stale one counts only where all are.
        stale: What changed since in the method, so that the same run now gives other numbers;
            missing where nothing did.
        target: What was asked of the weights: the sparsity, and of quantized ones `INT4` too.
        ratio: What the sparsity means, 0.5 for 2:4; realised_ratio: the share of zeros, measured.
        structure: What the sparsity counts: `zeros`, or `blocks` that are removed.
        removed_ratio: The share of the weights that are gone with their blocks; they are no zeros.
        form, size_bytes, size_ratio: In which form a checkpoint of it is stored (`dense`, `2:4`,
            `bitmap`, `INT4`, `2:4 + INT4`), its bytes, and those beside the dense model's in 16
            bits; computed.
        prune_seconds, recover_seconds, total_seconds, peak_rss_bytes, peak_gpu_bytes: What the run
            took; `prune_seconds` is without recovery.
        device, device_name, cpu, cpu_threads: Where it ran.
        storage, bytes_ratio, decode_speedup, prefill_speedup, speed, gpu: From `prunebench bench`:
            the form of the stored matrices, bytes and times the speed of dense, and `measured` or
            why not.

    Failed runs have no score and no row; their number is in `attrs["failed"]`. Damaged files are
    skipped with a warning, and named in `attrs["damaged"]`.

    Args:
        folder: The folder of results.
        selectors: As on the command line: `method=wanda`, `set.steps=12`.

    Raises:
        UsageError: A selector is malformed.
        MissingResource: There is no such folder, or no finished result in it is selected.
    """
    selection = Selection.parse(selectors)
    results, damaged = ResultStore(Path(folder)).read(layers=False)
    benches, broken = read_benches(Path(folder))
    skipped = [(str(file.path), file.reason) for file in damaged]
    skipped += [(str(path), reason) for path, reason in broken]
    for path, reason in skipped:
        warnings.warn(f"{path} is skipped: {reason}", stacklevel=2)
    frame = frame_of(results, selection, benches)
    frame.attrs["damaged"] = [list(file) for file in skipped]
    return frame


def frame_of(
    results: Sequence[Result],
    selection: Selection | None = None,
    benches: Mapping[str, Bench] | None = None,
) -> DataFrame:
    """Return the scores of results as a table; the columns are those of `load_results`.

    Args:
        results: What is there, failed runs too.
        selection: Which results and scores; None for all.
        benches: Bytes and speed by the id of a result.

    Raises:
        MissingResource: No finished result is selected.
    """
    import pandas as pd

    selection = selection or Selection()
    finished = [result for result in results if result.status == "ok"]
    rows = []
    for result in sorted(finished, key=lambda r: (r.created_at, r.id)):
        scores = [s for s in result.scores if selection.takes_score(s)]
        if not scores or not selection.takes(result):
            continue
        of_run = _run_fields(result) | _bench_fields((benches or {}).get(result.id))
        rows += [of_run | _score_fields(score) for score in scores]
    if not rows:
        raise nothing_selected(results, selection)
    frame = pd.DataFrame(rows)
    typed = {name: _typed(frame[name], name) for name in frame.columns}
    frame = pd.DataFrame(typed)
    frame["ratio_to_dense"] = frame["value"] / frame["dense"].where(frame["dense"] != 0)
    # stable: of runs that are as stale as each other, the latest is last
    fresh_last = frame.sort_values("stale", key=lambda stale: stale.isna(), kind="stable")
    frame["newest"] = ~fresh_last.duplicated(_REPEATED, keep="last")
    frame.attrs["failed"] = len(results) - len(finished)
    frame.attrs["damaged"] = []
    return frame[_ordered(list(frame.columns))]


def _run_fields(result: Result) -> dict[str, Any]:
    """Return what all scores of a run share."""
    spec, cost, hardware = result.spec, result.cost, result.hardware
    options = spec.model_dump(mode="json", exclude=_NOT_OF_A_CELL)
    # a part may have a seed of its own: it varies a cell as the run's seed does
    seeds: dict[str, Any] = {}
    for kind in _PARTS:
        plain = without_seeds(options[kind])
        own = {name: value for name, value in options[kind].items() if name not in plain}
        seeds |= {f"{kind}.{n}": seed for n, seed in own.items() if seed != spec.seed}
        options[kind] = plain
    key = json.dumps(options, sort_keys=True)
    if spec.calibration is None and result.training is None:
        options["calibration_bos"] = None  # it reads no windows
    for name, value in options.items():
        if isinstance(value, dict | list):
            options[name] = json.dumps(value, sort_keys=True)
    return {
        "cell": hashlib.sha256(key.encode()).hexdigest()[:12],
        "result_id": result.id,
        "created_at": result.created_at,
        "prunebench": result.software.prunebench,
        **options,
        **{OPTION + name: value for name, value in options_of_result(result).items()},
        "seed": spec.seed,
        "option_seeds": json.dumps(seeds, sort_keys=True),
        "target": target_of(result),
        "bits": result.quantization.bits if result.quantization else None,
        **_size_fields(result),
        "ratio": Sparsity.parse(spec.sparsity).ratio,
        "realised_ratio": result.sparsity.realised_ratio if result.sparsity else None,
        "structure": "blocks" if result.sparsity and result.sparsity.removal else "zeros",
        "removed_ratio": result.removed_ratio,
        "stale": result.stale or None,
        "prune_seconds": cost.prune_seconds if cost else None,
        "recover_seconds": result.recovery.seconds if result.recovery else None,
        "total_seconds": cost.total_seconds if cost else None,
        "peak_rss_bytes": cost.peak_rss_bytes if cost else None,
        "peak_gpu_bytes": cost.peak_gpu_bytes if cost else None,
        "device": hardware.device,
        "device_name": hardware.device_name,
        "cpu": hardware.cpu,
        "cpu_threads": hardware.cpu_threads,
    }


def _size_fields(result: Result) -> dict[str, Any]:
    """Return form and bytes of a checkpoint; missing where a result has no counts."""
    size = size_of(result)
    return {
        "form": size.form if size else None,
        "size_bytes": size.total_bytes if size else None,
        "size_ratio": size.ratio if size else None,
    }


def _score_fields(score: Score) -> dict[str, Any]:
    return {
        "metric": score.metric,
        "dataset": score.dataset,
        "protocol": score.protocol,
        "value": score.value,
        "stderr": score.stderr,
        "dense": score.dense_value,
        "dense_stderr": score.dense_stderr,
        "higher_is_better": score.higher_is_better,
        "limited": score.limited,
        "targets": score.targets,
        "tokens_sha256": score.tokens_sha256,
        "member_of": score.member_of,
    }


def _bench_fields(bench: Bench | None) -> dict[str, Any]:
    """Return bytes and speed; all missing where a run has no bench."""
    storage, size = bench.storage.best if bench else (None, None)
    return {
        "storage": storage,
        "bytes_ratio": size / bench.storage.dense_bytes if bench and size is not None else None,
        "decode_speedup": bench.decode.median if bench and bench.decode else None,
        "prefill_speedup": bench.prefill.median if bench and bench.prefill else None,
        "speed": bench.speed if bench else None,
        "gpu": _chip(bench) if bench else None,
    }


_FLOATS = (
    "value", "stderr", "dense", "dense_stderr", "ratio", "realised_ratio", "prune_seconds",
    "removed_ratio",
    "recover_seconds", "total_seconds", "bytes_ratio", "decode_speedup", "prefill_speedup",
    "size_ratio",
)  # fmt: skip
_NULLABLE: dict[type, str] = {int: "Int64", float: "Float64", bool: "boolean"}
_DTYPES = {
    **dict.fromkeys(_FLOATS, "float64"),
    **dict.fromkeys(
        ("peak_rss_bytes", "peak_gpu_bytes", "cpu_threads", "targets", "size_bytes", "bits"),
        "Int64",
    ),
    **dict.fromkeys(("higher_is_better", "limited"), "bool"),
    **{name: _NULLABLE[o.kind] for name, o in _OPTIONS.items() if o.kind in _NULLABLE},
}


def _chip(bench: Bench) -> str | None:
    """Return the chip on which speed was measured: a GPU, or a CPU with its threads."""
    facts = bench.environment
    if facts.get("gpu") or bench.speed != "measured" or not facts.get("cpu"):
        return facts.get("gpu")
    return f"{facts['cpu']}, {facts['threads']} threads"


def _typed(column: Series, name: str) -> Series:
    """Return a column with one type for all its values, as a parquet file needs it."""
    import pandas as pd

    if name == "created_at":
        return pd.to_datetime(column, utc=True, format="ISO8601")
    if name in _DTYPES:
        return column.astype(_DTYPES[name])
    present = column.notna()
    kinds = set(map(type, column[present])) if name.startswith(OPTION) else set()
    for kind, mixed in ((float, {int, float}), (int, {int}), (bool, {bool})):
        if kinds and kinds <= mixed:
            return column.where(present, pd.NA).astype(_NULLABLE[kind])
    return column.where(present, None).map(str, na_action="ignore").astype("string")


def _ordered(names: list[str]) -> list[str]:
    """Put the columns in the order of the docstring of `load_results`."""
    first = ["cell", "result_id", "created_at", "prunebench", *CELL_OPTIONS]
    first += sorted(name for name in names if name.startswith(OPTION))
    first += ["seed", "option_seeds", *(name for name in _SCORES if name not in first)]
    return [*first, *(name for name in names if name not in first)]
