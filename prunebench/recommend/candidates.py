"""The configurations that are raced for each goal, and what a checkpoint of each would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prunebench.pruners import METHODS
from prunebench.recommend.floor import Goal
from prunebench.results.sizes import DENSE_BITS, INDEX_BITS
from prunebench.sparsity import Sparsity

AT_ONCE, ONE_SHOT, RECOVERY = 0, 1, 2
"""The order of a race: what reads no data, what is calibrated, what is trained afterwards."""

_GROUP_SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class ModelCounts:
    """What the bytes of a checkpoint follow from.

    Attributes:
        parameters: Of the whole model.
        prunable: Weights of the matrices that methods change.
        widths: Inputs of those matrices.
    """

    parameters: int
    prunable: int
    widths: frozenset[int]

    @property
    def group_size(self) -> int:
        """Weights that share a step: the largest usual group that divides every width, else -1."""
        fitting = (s for s in _GROUP_SIZES if all(width % s == 0 for width in self.widths))
        return next(fitting, -1)


@dataclass(frozen=True)
class Candidate:
    """One configuration.

    Attributes:
        name: For people; unique in a race.
        wave: `AT_ONCE`, `ONE_SHOT` or `RECOVERY`.
        options: The options of `prunebench run` that make it.
        expected_bytes: Of its checkpoint, before there is a row.
    """

    name: str
    wave: int
    options: dict[str, Any] = field(hash=False)
    expected_bytes: int

    @property
    def reads(self) -> bool:
        """Whether it reads calibration windows."""
        return self.wave != AT_ONCE


def candidates_for(goal: Goal, counts: ModelCounts) -> tuple[Candidate, ...]:
    """Return what is raced, in order: cheap waves first, and the smallest first in each."""
    candidates = [_candidate(counts, **options) for options in _OF_GOAL[goal]]
    # sorted is stable: equals stay in the order of the table
    return tuple(sorted(candidates, key=lambda c: (c.wave, c.expected_bytes)))


def _candidate(
    counts: ModelCounts,
    *,
    method: str,
    sparsity: str = "0",
    bits: int | None = None,
    recover: bool = False,
) -> Candidate:
    options: dict[str, Any] = {"method": method}
    words = [method]
    if sparsity != "0":
        options["sparsity"] = sparsity
        words.append(sparsity)
    if bits:
        options["set"] = {"quantize_bits": bits, "group_size": counts.group_size}
        words.append(f"INT{bits}" if sparsity == "0" else f"+ INT{bits}")
    if method == "depth":
        words.append("of the blocks")
    name = " ".join(words)
    wave = ONE_SHOT if METHODS.find(method).data else AT_ONCE
    if recover:
        options["recover"] = "block"
        # 2% behind the default on SmolLM2-135M, a third ahead on Gemma 3 270M (docs/findings.md)
        options["set"] = {**options.get("set", {}), "recover.loss": "channels"}
        name, wave = f"{name}, then block", RECOVERY
    size = expected_bytes(counts, blocks=method == "depth", sparsity=sparsity, bits=bits)
    return Candidate(name, wave, options, size)


def expected_bytes(
    counts: ModelCounts, *, sparsity: str, bits: int | None = None, blocks: bool = False
) -> int:
    """Return the bytes of a checkpoint as `results.sizes` counts them, before there is a row.

    Exact where groups divide the widths; of removed blocks, a share of the matrices.
    """
    target = Sparsity.parse(sparsity)
    weights = counts.prunable
    rest = (counts.parameters - weights) * DENSE_BITS
    if blocks:
        return round((weights * (1 - target.ratio) * DENSE_BITS + rest) / 8)
    value = bits or DENSE_BITS
    stored = weights * value
    if target.ratio:
        pruned = round(weights * (1 - target.ratio)) * value + weights * INDEX_BITS
        # of INT3 a bitmap would take more than it saves: the smaller form counts
        stored = pruned if target.group else min(stored, pruned)
    if bits:
        width = sum(counts.widths) / max(1, len(counts.widths))
        per_group = counts.group_size if counts.group_size > 0 else width
        stored += round(weights / per_group) * (DENSE_BITS + bits)
    return -(-(stored + rest) // 8)


_24: Sequence[dict[str, Any]] = (
    *({"method": m, "sparsity": "2:4"} for m in ("magnitude", "wanda", "sparsegpt", "alps")),
    *(
        {"method": m, "sparsity": "2:4", "recover": True}
        for m in ("magnitude", "wanda", "sparsegpt", "alps")
    ),
)

_OF_GOAL: dict[Goal, Sequence[dict[str, Any]]] = {
    "bytes": (
        *({"method": m, "bits": bits} for m in ("rtn", "gptq") for bits in (3, 4, 8)),
        {"method": "sparsegpt", "sparsity": "2:4", "bits": 4},
        *({"method": m, "sparsity": "2:4"} for m in ("wanda", "sparsegpt", "alps")),
        *({"method": m, "sparsity": "0.5"} for m in ("wanda", "sparsegpt", "alps")),
        *({"method": "depth", "sparsity": share} for share in ("0.1", "0.2")),
        {"method": "sparsegpt", "sparsity": "2:4", "bits": 4, "recover": True},
        {"method": "sparsegpt", "sparsity": "2:4", "recover": True},
        {"method": "alps", "sparsity": "2:4", "recover": True},
        {"method": "sparsegpt", "sparsity": "0.5", "recover": True},
    ),
    "speed": (*_24, *({"method": "depth", "sparsity": s} for s in ("0.1", "0.2", "0.3"))),
    "2:4": _24,
}
