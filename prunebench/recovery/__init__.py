"""Recoverers: training of the kept weights after pruning, with the zeros where they are.

Any recoverer goes with any method, pattern and allocation: `run --method sparsegpt --recover
block`. The mask is read from the zeros of the pruned weights; every pruned place stays +0.0, and
N:M and the number of zeros are checked afterwards as always. `--recover block+distill` does one
after the other; the options of both are then named with their recoverer: `recover.block.epochs`.
"""

from __future__ import annotations

from collections.abc import Mapping

from prunebench.errors import UsageError
from prunebench.registry import Registry, Row
from prunebench.spec import OptionValue

THEN = "+"
"""Between the names of recoverers that follow each other, as in `block+distill`."""

BUILTIN: dict[str, Row] = {
    "block": Row(
        "prunebench.recovery.block:Block",
        "each block's output is pulled back to the dense model's, during the walk",
        paper="2406.15524",
        data=True,
    ),
    "distill": Row(
        "prunebench.recovery.distill.recoverer:Distill",
        "the pruned model learns the dense one's outputs, end to end",
        paper="2407.20584",
        data=True,
    ),
}

RECOVERERS = Registry(
    kind="recoverer",
    entry_points="prunebench.recoverers",
    row=Row,
    builtin=BUILTIN,
    required=("needs", "check"),
    option="recover.",
)


def resolve_parts(
    name: str, given: Mapping[str, OptionValue], *, seed: int
) -> list[tuple[str, dict[str, OptionValue]]]:
    """Return the recoverers of a name such as `block+distill`, each with all its options.

    Args:
        name: Of one recoverer, or several with `+` between.
        given: Options, with the name of their recoverer before them (`block.lr`) or without; of
            several recoverers it may be left out only where one of them has the option.
        seed: Of the run.

    Raises:
        UsageError: A name or an option is unknown, or an option could be that of several.
    """
    names = name.split(THEN)
    if len(set(names)) < len(names):
        raise UsageError(f"--recover {name} names a recoverer twice")
    # the options of each with their defaults, to see which has which
    usual = {part: RECOVERERS.resolve_options(part, {}, seed=seed) for part in names}
    shares: dict[str, dict[str, OptionValue]] = {part: {} for part in names}
    for key, value in given.items():
        owner, _, rest = key.rpartition(".")
        if owner in shares:
            _give(shares[owner], rest, value)
            continue
        owners = [part for part in names if key in usual[part]]
        if len(owners) > 1:
            raise UsageError(
                f"{' and '.join(owners)} both have an option {key!r}",
                where=f"in --recover {name}",
                fix=" or ".join(f"--set recover.{part}.{key}={value}" for part in owners),
            )
        # an unknown option: the first says what it has
        _give(shares[owners[0] if owners else names[0]], key, value)
    return [(part, RECOVERERS.resolve_options(part, shares[part], seed=seed)) for part in names]


def _give(share: dict[str, OptionValue], key: str, value: OptionValue) -> None:
    if key in share:
        raise UsageError(
            f"--set recover: the option {key!r} is given twice",
            where="with the name of its recoverer before it, and without",
            fix="leave one of them out",
        )
    share[key] = value


def join_options(parts: list[tuple[str, dict[str, OptionValue]]]) -> dict[str, OptionValue]:
    """Return the options of all parts as a spec holds them: of several, with the part's name."""
    if len(parts) == 1:
        return parts[0][1]
    return {f"{name}.{key}": value for name, options in parts for key, value in options.items()}


def describe(name: str) -> Row:
    """Return implementation, papers and distribution of a name such as `block+distill`."""
    rows = [RECOVERERS.find(part) for part in name.split(THEN)]
    papers = ", ".join(row.paper for row in rows if row.paper)
    return Row(
        THEN.join(row.target for row in rows),
        THEN.join(row.about for row in rows),
        paper=papers or None,
        # built-in ones all are of this version
        distribution=THEN.join(dict.fromkeys(row.distribution for row in rows)),
    )
