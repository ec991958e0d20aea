"""Bytes and speed of a pruned checkpoint, saved beside the result that holds its quality.

    results/<model>/<method>-<sparsity>/<run_id>.<time>.bench

A speed is here only if both sides were measured in one run on one device; else `speed` says why not
and every figure of speed is null.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from prunebench.files import publish_text
from prunebench.results.moment import Moment

SUFFIX = ".bench"  # not .json: every *.json of the folder is read as a result


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StorageBlock(_Block):
    """Bytes of all tensors of the checkpoint; `computed`, not measured in a running model.

    Attributes:
        dense_bytes: As they are when all are dense.
        packed24_bytes: With 2:4 matrices as values and 4-bit codes; null if there are none.
        bitmap_bytes: With pruned matrices as a bit a weight and the kept values.
        pruned_bytes: Of the pruned matrices alone when they are dense.
        label: Always `computed`.
    """

    dense_bytes: int
    packed24_bytes: int | None
    bitmap_bytes: int
    pruned_bytes: int
    label: Literal["computed"] = "computed"

    @property
    def best(self) -> tuple[str, int]:
        """The smaller of the forms that can be run or stored, and its bytes."""
        # 2:4 wherever there is one, even if a bitmap would be smaller
        if self.packed24_bytes is not None:
            return "2:4", self.packed24_bytes
        smaller = self.bitmap_bytes < self.dense_bytes
        return ("bitmap", self.bitmap_bytes) if smaller else ("dense", self.dense_bytes)


class QualityBlock(_Block):
    """A score of the result that the checkpoint came from."""

    metric: str
    protocol: str
    value: float
    dense_value: float | None


class RatioBlock(_Block):
    """Dense time over packed time, the median of interleaved blocks: above 1 is faster."""

    median: float
    low: float
    high: float
    blocks: int


class Bench(_Block):
    """One bench of one checkpoint.

    Attributes:
        result_id: The result of its run; null for a checkpoint of unknown origin.
        vs: What it was compared with.
        speed: `measured`, or why not.
        decode: Of one sequence behind 128 tokens, per token; null if not measured.
        prefill: Of one sequence of 2,048 tokens; null if not measured.
        resident_bytes: Weights of the packed model by storage, in memory; null if not loaded.
        layers: Cells of the grid (`bench_layers.LayerResult`).
        cases: Prefill and decode (`bench_model.ModelResult`).
        environment: Chip, driver and library versions, clocks before and after.
    """

    schema_version: Literal[1] = 1
    created_at: Moment
    command: str
    checkpoint: str
    result_id: str | None
    vs: Literal["dense"]
    quality: list[QualityBlock]
    storage: StorageBlock
    speed: str
    decode: RatioBlock | None
    prefill: RatioBlock | None
    resident_bytes: int | None
    layers: list[dict[str, Any]]
    cases: list[dict[str, Any]]
    environment: dict[str, Any]


def write_bench(result_path: Path, bench: Bench) -> Path:
    """File a bench beside its result; returns its path.

    Raises:
        SaveError: It could not be written.
    """
    # microseconds: two benches of a result may end in the same second
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    path = result_path.with_name(f"{result_path.stem}.{stamp}{SUFFIX}")
    publish_text(path, bench.model_dump_json(indent=1) + "\n")
    return path


def read_benches(root: Path) -> tuple[dict[str, Bench], list[tuple[Path, str]]]:
    """Return the newest bench of every result in a folder, and the files that are damaged.

    One with speed is preferred to a newer one without, and the speed of a GPU to that of a CPU: a
    laptop does not hide what a GPU measured.
    """
    benches: list[Bench] = []
    damaged: list[tuple[Path, str]] = []
    for path in sorted(root.rglob(f"*{SUFFIX}")):
        try:
            benches.append(Bench.model_validate_json(path.read_text("utf-8")))
        except (OSError, ValidationError, ValueError) as error:
            damaged.append((path, str(error).splitlines()[0]))
    return _newest(benches), damaged


def _newest(benches: Iterable[Bench]) -> dict[str, Bench]:
    newest: dict[str, Bench] = {}

    def rank(bench: Bench) -> tuple[bool, bool, str]:
        return bench.speed == "measured", bench.environment.get("device") != "cpu", bench.created_at

    # later ones replace earlier ones: the newest of those with a GPU's speed is last
    for bench in sorted(benches, key=rank):
        if bench.result_id is not None:
            newest[bench.result_id] = bench
    return newest
