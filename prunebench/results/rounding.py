"""Noise of rounding, as it was measured: `rounding.toml`.

A row says what a method's perplexity was under several orders of summation of the same numbers. It
holds for results of the same model, method, target and number of calibration windows that have
nothing else changed (no allocation, no recovery): of others nothing is known.
"""

from __future__ import annotations

import functools
import math
import statistics
import tomllib
from importlib import resources

FIELDS = ("model", "method", "target", "samples")
_LEAST = 5  # of fewer values a deviation says little


@functools.cache
def rounding_table() -> dict[tuple[str, str, str, int], float]:
    """Return the standard deviation of log perplexity by model, method, target and windows."""
    text = resources.files("prunebench.results").joinpath("rounding.toml").read_text("utf-8")
    return {
        tuple(row[name] for name in FIELDS): statistics.stdev(map(math.log, row["values"]))
        for row in tomllib.loads(text).get("measured", [])
        if len(row["values"]) >= _LEAST
    }


def rounding_of(model: str, method: str, target: str, samples: int | None) -> float | None:
    """Return the deviation of log perplexity that rounding alone gives; None if not measured."""
    table = rounding_table()
    if samples is not None:
        return table.get((model, method, target, samples))
    # a method without data: its mask does not depend on the windows it was called with
    return next((v for key, v in table.items() if key[:3] == (model, method, target)), None)
