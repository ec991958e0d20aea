"""Versions of the built-in methods, allocators and recoverers: what changed, and in which rows.

A version counts the changes after which the same specification gives other numbers; the first is 1.
Results record the versions of what made them, and a row of before a change that touched it is
stale: it still says what was measured then, and nobody can measure it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prunebench.spec import NO_RECOVERY, RunSpec

MISSING = 1e-4
"""A share of the weights: with so many zeros less than asked for, a row is not exact."""


@dataclass(frozen=True)
class Change:
    """Something after which equal specifications give other numbers.

    Attributes:
        parts: What changed: `method wanda`, `allocator owl`, `recoverer block`.
        date: Of the commit.
        about: What gives other numbers, and where.
        fewer_zeros_only: Whether it touched those rows alone that have fewer zeros than asked for.
    """

    parts: tuple[str, ...]
    date: str
    about: str
    fewer_zeros_only: bool = False


CHANGES: tuple[Change, ...] = (
    Change(
        ("method random", "method wanda", "method ria", "method gblm", "method gradient"),
        "2026-11-28",
        "rows of no whole share lose the remainder too (70.00% zeros, not 69.97%)",
        fewer_zeros_only=True,
    ),
)
"""All changes, the oldest first. A new one raises the version of its parts by 1."""


def parts_of(spec: RunSpec) -> list[str]:
    """Return what makes the numbers of a run: its method, the prior's, allocator, recoverers."""
    parts = [f"method {spec.method}"]
    prior = spec.method_options.get("prior")  # MaskLLM begins with another method's mask
    parts += [f"method {prior}"] if isinstance(prior, str) else []
    parts.append(f"allocator {spec.allocation}")
    names = spec.recover.split("+") if spec.recover != NO_RECOVERY else []
    return [*parts, *(f"recoverer {name}" for name in names)]


def current_version(part: str) -> int:
    """Return the version of a part of this program, such as `method wanda`."""
    return 1 + len(_changes_of(part))


def versions_of(parts: Iterable[str]) -> dict[str, int]:
    """Return the current versions as a result records them: those above 1."""
    return {part: number for part in parts if (number := current_version(part)) > 1}


def why_stale(
    parts: Iterable[str], recorded: Mapping[str, int], *, target: float | None, realized: float
) -> str:
    """Return what changed since a row was measured; empty if the row is what it would be today.

    Args:
        parts: What made the row.
        recorded: Versions in its result; a part that is not there has 1.
        target: The ratio of zeros that was asked for; None where the row has another target.
        realized: The ratio of zeros that it has.
    """
    # more zeros than asked for are the dense model's own
    fewer_zeros = target is not None and realized < target - MISSING
    reasons = [
        f"{part.partition(' ')[2]} before version {number}: {change.about}"
        for part in parts
        for number, change in enumerate(_changes_of(part), start=2)
        if number > recorded.get(part, 1) and (fewer_zeros or not change.fewer_zeros_only)
    ]
    return "; ".join(reasons)


def _changes_of(part: str) -> list[Change]:
    return [change for change in CHANGES if part in change.parts]
