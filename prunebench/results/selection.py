"""Select results and scores with words such as `method=wanda,magnitude` or `set.steps=2000`."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prunebench.errors import MissingResource, UsageError, nearest
from prunebench.options import options_of
from prunebench.results.names import short_protocol
from prunebench.results.schema import Result, Score
from prunebench.spec import RunSpec

_OPTIONS = options_of(RunSpec)
_SCORE_KEYS = ("protocol", "dataset", "metric")


def _spec_value(name: str, result: Result) -> object:
    return getattr(result.spec, name)


_SELECTORS: dict[str, Callable[[Result], object]] = {
    name: functools.partial(_spec_value, name)
    for name, option in _OPTIONS.items()
    if option.about.given and (option.about.cell or option.about.role != "evaluation")
} | {"device": lambda result: result.hardware.device}
OPTION = "set."  # and a name, as in set.steps or set.allocation.low


def read_selectors(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the values of `key=value,value` words by key.

    Raises:
        UsageError: A word has another form, or a key is there twice.
    """
    filters: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not values:
            raise UsageError(
                f"{word!r} is not a selector", fix="use key=value[,value], as in method=wanda"
            )
        # keys may be spelled as on the command line, model-revision, or as in a spec
        key = key.replace("-", "_")
        if key in filters:
            both = dict.fromkeys((*filters[key], *values.split(",")))
            raise UsageError(f"{key} is selected twice", fix=f"use {key}={','.join(both)}")
        filters[key] = tuple(values.split(","))
    return filters


@dataclass(frozen=True)
class Selection:
    """`key=value,value` filters; a value may hold `*` and `?`, and a key be `set.OPTION`."""

    filters: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Selection:
        """Read selectors such as `model=llama2-7b` and `method=wanda,magnitude`.

        Raises:
            UsageError: A word is no selector, or its key is unknown.
        """
        keys = (*_SELECTORS, *_SCORE_KEYS)
        filters = read_selectors(words)
        for key in filters:
            if key not in keys and not key.startswith(OPTION):
                raise UsageError(f"unknown selector {key!r}", fix=nearest(key, keys))
        return cls(filters)

    def takes(self, result: Result) -> bool:
        """Whether a result is selected."""
        return all(
            _matches(_value(key, result), patterns)
            for key, patterns in self.filters.items()
            if key not in _SCORE_KEYS
        )

    def takes_score(self, score: Score) -> bool:
        """Whether a score is selected."""
        return all(
            _matches(getattr(score, key), self.filters[key])
            or (key == "protocol" and _matches(short_protocol(score.protocol), self.filters[key]))
            for key in _SCORE_KEYS
            if key in self.filters
        )


def _value(key: str, result: Result) -> object:
    """Return what a result has under a selector's key; an option that it has not is `-`."""
    if key in _SELECTORS:
        return _SELECTORS[key](result)
    return options_of_result(result).get(key.removeprefix(OPTION), "-")


def options_of_result(result: Result) -> dict[str, object]:
    """Return the options of all parts without their seeds, named as in `--set`."""
    spec = result.spec
    options: dict[str, object] = dict(spec.method_options)
    options |= {f"allocation.{name}": value for name, value in spec.allocation_options.items()}
    options |= {f"recover.{name}": value for name, value in spec.recover_options.items()}
    return without_seeds(options)


def without_seeds(options: Mapping[str, object]) -> dict[str, object]:
    """Leave out `seed` and, of two recoverers that follow, `distill.seed`: as the run's seed is."""
    return {k: v for k, v in options.items() if k.rpartition(".")[2] != "seed"}


def _matches(value: object, patterns: Iterable[str]) -> bool:
    return any(matches_word(value, pattern) for pattern in patterns)


def matches_word(value: object, pattern: str) -> bool:
    """Whether a selector's value, which may hold `*` and `?`, means this; 1e-5 is 0.00001."""
    word = str(value).lower() if isinstance(value, bool) else str(value)
    if fnmatch.fnmatchcase(word, pattern):
        return True
    # a bool is an int in Python: set.X=1 would select True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return float(pattern) == value
    except ValueError:
        return False


def nothing_selected(results: Sequence[Result], selection: Selection) -> MissingResource:
    """Return the error: it names the first value that no result has, and the nearest one."""
    finished = [result for result in results if result.status == "ok"]
    if not selection.filters or not finished:
        return MissingResource(
            "no result with a score is there",
            where=f"{len(results) - len(finished)} of {len(results)} runs failed"
            if results
            else "",
            fix="run prunebench run --method wanda, or name another folder with --results-dir",
        )
    where = f"{len(finished)} finished results are there, none matches"
    # each selector by itself; if each matches something, it is their combination that does not
    for key, patterns in selection.filters.items():
        if key.startswith(OPTION):
            names = {OPTION + name for result in finished for name in options_of_result(result)}
            if key not in names:
                return MissingResource(
                    f"no result has an option {key}", where=where, fix=nearest(key, names)
                )
        values_by_word = _values(key, finished)
        for pattern in patterns:
            if not any(_matches(value, [pattern]) for value in values_by_word.values()):
                return MissingResource(
                    f"no result has {key}={pattern}",
                    where=where,
                    fix=nearest(pattern, values_by_word),
                )
    for key, patterns in reversed(selection.filters.items()):
        others = {name: value for name, value in selection.filters.items() if name != key}
        rest = Selection(others)
        there = [r for r in finished if rest.takes(r) and any(map(rest.takes_score, r.scores))]
        if others and there:
            words = " ".join(f"{name}={','.join(value)}" for name, value in others.items())
            return MissingResource(
                f"no result is selected: none with {words} has {key}={','.join(patterns)}",
                where=where,
                fix=nearest(patterns[0], _values(key, there)),
            )
    return MissingResource(
        "no result is selected",
        where=where,
        fix="leave a selector out, or run prunebench compare without any",
    )


def _values(key: str, results: Sequence[Result]) -> dict[str, object]:
    """Return all values that a selector's key has in some results, by what they are called."""
    if key in _SCORE_KEYS:
        values = [getattr(score, key) for result in results for score in result.scores]
        if key == "protocol":
            values += [short_protocol(value) for value in values]
    else:
        values = [_value(key, result) for result in results]
    return {str(value): value for value in values}
