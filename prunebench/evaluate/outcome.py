"""Outcomes of an evaluation: the measures of one protocol, and the values of every item.

An evaluator (a text cut into windows, a task of lm-eval) has a method `score(model)`. Outcomes of
dense models are cached by the model's weights and config, and the evaluator's key.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from prunebench.files import cache_dir, write_text
from prunebench.models.hashing import settings_text

_CACHE_VERSION = 2  # in the file's name: outcomes of another layout are not found


@dataclass(frozen=True)
class Measure:
    """One metric: its value, its standard error over the items, and which way is better."""

    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Item:
    """One document or window: the hash of its input, and its values by metric."""

    sha256: str
    values: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """The measures of a model under one protocol.

    Attributes:
        protocol: The id, e.g. `wikitext2-raw/test/2048/v1`.
        dataset: The text or task.
        origin: Where the data came from.
        targets: Predicted tokens, or documents.
        limited: True where only the first part of the data was used.
        sha256: Hash of all inputs.
        measures: By name of the metric.
        items: In order; empty for the mean of a group of tasks.
        member_of: The group with a score that it is a part of; empty where there is none.
    """

    protocol: str
    dataset: str
    origin: str
    targets: int
    limited: bool
    sha256: str
    measures: dict[str, Measure]
    items: tuple[Item, ...] = ()
    member_of: str = ""


@runtime_checkable
class Evaluator(Protocol):
    """A text or a task that a model can be scored on.

    `name` and `unit` are shown by progress; `units` is the total that `score` reports to `advance`;
    `key` is the cache key: it changes whenever the outcome of the same model could.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def units(self) -> int: ...  # noqa: D102
    @property
    def key(self) -> str: ...  # noqa: D102
    def score(  # noqa: D102
        self, model: nn.Module, *, advance: Callable[[int], None]
    ) -> list[Outcome]: ...


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of `values`; None for less than two."""
    # s / sqrt(n), with the sample deviation s (n - 1)
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class ScoredModel:
    """What tells a model from others in the cache of outcomes.

    Attributes:
        sha256: Of its weights.
        settings: `settings_text` of it.
    """

    sha256: str
    settings: str

    @classmethod
    def of(cls, model: nn.Module, sha256: str) -> ScoredModel:
        """Identify a model as it is now, for all evaluations: buffers on disk are read."""
        return cls(sha256, settings_text(model))


def cached_outcomes(model: ScoredModel, evaluator: Evaluator) -> list[Outcome] | None:
    """Return the cached outcomes of a model in this evaluation, if any."""
    try:
        rows = json.loads(_cache_path(model, evaluator).read_text("utf-8"))
        return outcomes_from(rows) or None
    # a damaged cache file counts as absent: the dense model is then scored again
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def outcomes_from(rows: list[dict[str, Any]]) -> list[Outcome]:
    """Return outcomes from their `dataclasses.asdict` form."""
    return [
        Outcome(
            **row
            | {"measures": {name: Measure(**m) for name, m in row["measures"].items()}}
            | {"items": tuple(Item(**item) for item in row["items"])}
        )
        for row in rows
    ]


def remember_outcomes(model: ScoredModel, evaluator: Evaluator, outcomes: list[Outcome]) -> None:
    """Cache a model's outcomes for later runs.

    Raises:
        SaveError: The cache cannot be written.
    """
    text = json.dumps([asdict(outcome) for outcome in outcomes])
    write_text(_cache_path(model, evaluator), text + "\n")


def _cache_path(model: ScoredModel, evaluator: Evaluator) -> Path:
    key = hashlib.sha256(f"{model.settings}\0{evaluator.key}".encode()).hexdigest()
    # 96 bits of each hash: short names that still do not collide
    name = f"{model.sha256[:24]}-{key[:24]}-v{_CACHE_VERSION}.json"
    return cache_dir() / "baselines" / name
