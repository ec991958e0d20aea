"""Recipes: TOML files with one run or a grid of them, and what should come out.

    about = "Wanda on LLaMA-2"      # for people
    model = "llama2-7b"             # at the top: options of `prunebench run`, for all cells

    [[grid]]                        # a list is an axis: these are four cells
    method = ["magnitude", "wanda"]
    sparsity = ["0.5", "2:4"]

    [[expect]]                      # the cells of a paper's table that should come out ...
    paper = "2306.11695"
    table = "Table 3"
    tolerance = 0.02

    [[expect]]                      # ... or a value that was measured before
    method = "wanda"
    sparsity = "2:4"
    protocol = "wiki-sample/held-out/512/v1"
    value = 123.0
    tolerance = 0.05

    [needs]                         # what it takes; a sweep looks before it starts
    gpu_memory_gb = { llama2-7b = 19 }
    time = "not measured"

    [resources]                     # what a cell asks of Slurm or Ray, if --resource does not
    gpus = 1
    time = "4:00:00"

`ppl` and `tasks` are lists of names and never axes. TOML and not YAML: YAML 1.1 reads a bare `2:4`
as the number 124.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunebench.errors import PrunebenchError, UsageError, nearest
from prunebench.evaluate.records import task_table
from prunebench.results.published import PublishedValue, published_values
from prunebench.results.selection import OPTION, matches_word, read_selectors
from prunebench.run_options import RUN_KEYS, spec_of, with_defaults
from prunebench.spec import RunSpec
from prunebench.sweep.engines.job import RESOURCE_KEYS, Resources

_NUMBER = (int, float)
_Kinds = type | tuple[type, ...]
_NEVER_AXES = ("ppl", "tasks")
_TOP: dict[str, _Kinds] = {
    **RUN_KEYS, "about": str, "grid": list, "expect": list, "needs": dict, "resources": dict,
}  # fmt: skip
_EXPECT: dict[str, _Kinds] = {
    "paper": str, "table": (str, list), "tolerance": _NUMBER, "metric": str, "model": str,
    "method": str, "sparsity": (str, float, int), "allocation": str, "protocol": str,
    "value": _NUMBER, "source": str,
}  # fmt: skip
_NEEDS: dict[str, _Kinds] = {"gpu_memory_gb": dict, "time": str}


@dataclass(frozen=True)
class RecipeCell:
    """One run of a recipe.

    Attributes:
        number: Its place in the recipe, from 1.
        given: The options of `prunebench run` that the recipe gives.
        values: All options, with defaults.
    """

    number: int
    given: dict[str, Any]
    values: dict[str, Any]

    @property
    def arguments(self) -> list[str]:
        """The words behind `prunebench run`."""
        words: list[str] = []
        for key, value in self.given.items():
            option = f"--{key.replace('_', '-')}"
            if key == "set":
                for name, one in _flat(value):
                    words += [option, f"{name}={_word(one)}"]
            elif isinstance(value, bool):
                words += [option] if value else []
            else:
                words += [option, ",".join(value) if isinstance(value, list) else _word(value)]
        return words

    @property
    def name(self) -> str:
        """What tells it from the others, in a few words."""
        values = self.values
        text = values["method"]
        if text != "dense":
            text += f" {values['sparsity']}"
        if values["allocation"] != "uniform":
            text += f", {values['allocation']}"
        options = [f"{name}={_word(one)}" for name, one in _flat(self.given.get("set", {}))]
        text += f", {' '.join(options)}" if options else ""
        return f"{text} on {values['model']}, seed {values['seed']}"

    @property
    def spec(self) -> RunSpec:
        """What is run, before names are resolved to content."""
        return spec_of(self.values)

    def matches(self, filters: Mapping[str, Sequence[str]]) -> bool:
        """Whether it is selected by `key=value,value` filters; a value may hold `*`.

        Of an option that is a list, such as `tasks`, one of its values is enough. `set.KEY` is an
        option that the recipe sets.
        """
        return all(
            any(matches_word(value, pattern) for value in self.value(key) for pattern in patterns)
            for key, patterns in filters.items()
        )

    def value(self, key: str) -> list[Any]:
        """Return what a selector's key means here; an empty list is `None`."""
        if key.startswith(OPTION):
            return [dict(_flat(self.given.get("set", {}))).get(key.removeprefix(OPTION), "-")]
        value = self.values[key]
        return list(value or [None]) if isinstance(value, tuple | list) else [value]

    def scores(self, value: PublishedValue) -> bool:
        """Whether its scores can stand beside a value that was published or measured before."""
        mine = self.values
        same = (mine["method"], mine["sparsity"], mine["model"], mine["allocation"]) == (
            value.method, value.sparsity, value.model, value.allocation,
        )  # fmt: skip
        if not same:
            return False
        if value.metric == "token_ppl":
            texts = [re.split("[@:]", name)[0] for name in mine["ppl"]]
            asked_so = (value.seqlen, value.limit, value.bos) == (
                mine["ppl_seqlen"], mine["ppl_tokens"], mine["ppl_bos"],
            )  # fmt: skip
            return asked_so and value.dataset in texts
        presets = task_table()["preset"]
        asked = {task for name in mine["tasks"] for task in presets.get(name, [name])}
        zero_shot = mine["num_fewshot"] in (None, 0) and not mine["apply_chat_template"]
        return zero_shot and mine["limit"] == value.limit and set(value.tasks) <= asked


@dataclass(frozen=True)
class Expectation:
    """A value that a recipe should reproduce, and how far off it may be."""

    value: PublishedValue
    tolerance: float


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been read and checked as far as it can be without a model.

    Attributes:
        about: What it is for.
        cells: Its runs, in the order of the file.
        expectations: What should come out.
        gpu_memory_gb: What a GPU needs for a model, as far as the recipe says.
        time: What the recipe says about time.
        resources: What a cell asks of a cluster, by the keys of `--resource`.
    """

    path: Path
    about: str
    cells: tuple[RecipeCell, ...]
    expectations: tuple[Expectation, ...] = ()
    gpu_memory_gb: dict[str, float] = field(default_factory=dict)
    time: str = ""
    resources: dict[str, Any] = field(default_factory=dict)

    def single(self) -> dict[str, Any]:
        """Return the options of its only cell.

        Raises:
            UsageError: It has several.
        """
        if len(self.cells) != 1:
            raise UsageError(
                f"{self.path} is a grid of {len(self.cells)} cells",
                fix=f"use prunebench sweep {self.path}, or a recipe with one cell",
            )
        return self.cells[0].given

    def select(self, words: Sequence[str]) -> list[RecipeCell]:
        """Return the cells that `key=value,value` words select.

        Raises:
            UsageError: A word is no selector, its key is unknown, or no cell is selected.
        """
        options = {OPTION + name for c in self.cells for name, _ in _flat(c.given.get("set", {}))}
        known = options | RUN_KEYS.keys() - {"set"}
        filters = read_selectors(words)
        for key in filters:
            if key not in known:
                raise UsageError(f"unknown selector {key!r}", fix=nearest(key, known))
        chosen = [cell for cell in self.cells if cell.matches(filters)]
        if not chosen:
            raise self._nothing_selected(filters)
        return chosen

    def _nothing_selected(self, filters: Mapping[str, Sequence[str]]) -> UsageError:
        """Return the error: the value that no cell has, or the values that no cell has together."""
        for key, patterns in filters.items():
            if not any(cell.matches({key: patterns}) for cell in self.cells):
                there = {_word(value) for cell in self.cells for value in cell.value(key)}
                return UsageError(
                    f"no cell of {self.path} has {key} {','.join(patterns)}",
                    fix=nearest(patterns[0], there),
                )
        so_far: dict[str, Sequence[str]] = {}
        for key, patterns in filters.items():
            cells = [cell for cell in self.cells if cell.matches(so_far)]
            together = so_far | {key: patterns}
            if not any(cell.matches(together) for cell in cells):
                break
            so_far = together
        words = [f"{name}={','.join(values)}" for name, values in together.items()]
        there = {_word(value) for cell in cells for value in cell.value(key)}
        return UsageError(
            f"no cell of {self.path} has {' and '.join(words)} together",
            where=f"with {' '.join(words[:-1])}, {key} is {', '.join(sorted(there))}",
            fix="choose one of these, or run the cell with prunebench run",
        )


def read_recipe(path: Path, *, complete: bool = False) -> Recipe:
    """Read a recipe and check its keys, types and names.

    Args:
        path: The file.
        complete: Whether every cell must stand for itself. Where not, a recipe without a grid may
            leave options out, to be given as flags.

    Raises:
        UsageError: It cannot be read, is not TOML, or holds what is not known: file, line and the
            nearest known key are named.
    """
    source = _Source(path)
    table = source.table
    source.check(table, _TOP, "")
    given = {key: value for key, value in table.items() if key in RUN_KEYS}
    grids = table.get("grid", [])
    if not grids and not complete:
        needless = [key for key in ("expect", "needs") if key in table]
        cells = (RecipeCell(1, given, {}),) if not needless else _cells(source, [given])
    else:
        cells = _cells(source, _expand(source, given, grids))
    needs = table.get("needs", {})
    source.check(needs, _NEEDS, "[needs]")
    resources = table.get("resources", {})
    source.check(resources, RESOURCE_KEYS, "[resources]")
    try:
        Resources.of(resources)
    except UsageError as error:
        error.where = " / ".join(filter(None, (source.at("", "[resources]"), error.where)))
        raise
    return Recipe(
        path=path,
        about=table.get("about", ""),
        cells=cells,
        expectations=tuple(_expectations(source, table.get("expect", []), cells)),
        gpu_memory_gb={k: float(v) for k, v in needs.get("gpu_memory_gb", {}).items()},
        time=needs.get("time", ""),
        resources=resources,
    )


class _Source:
    """The text of a recipe, to say where something stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
            self.table = tomllib.loads(self.text)
        except OSError as error:
            raise UsageError(f"cannot read the recipe {path}", where=str(error.strerror)) from None
        except UnicodeDecodeError:
            raise UsageError(f"the recipe {path} is not UTF-8 text") from None
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"the recipe {path} is not TOML", where=str(error)) from None

    def at(self, key: str, section: str = "", nth: int = 0) -> str:
        """Return file and line of a key in the nth section of a name, or of the section itself."""
        lines = self.text.splitlines()
        heads = [i for i, line in enumerate(lines) if line.strip().startswith(section)]
        start = heads[nth] if section and nth < len(heads) else 0
        pattern = re.compile(rf"^\s*\[*\s*[\"']?{re.escape(key)}[\"']?\s*[=\].]")
        found = (i for i in range(start, len(lines)) if pattern.match(lines[i]))
        return f"{self.path}, line {next(found, start) + 1}"

    def check(
        self, table: Any, known: Mapping[str, _Kinds], section: str, nth: int = 0, *,
        axes: bool = False,
    ) -> None:  # fmt: skip
        """Refuse unknown keys and wrong types; with `axes`, a list of the right type will do."""
        if not isinstance(table, dict):
            name = section.strip("[]")
            raise UsageError(
                f"{name} is not a table", where=self.at(name), fix=f"write it as {section}"
            )
        for key, value in table.items():
            where = self.at(key, section, nth)
            if key not in known:
                place = f" in {section}" if section else " in a recipe"
                raise UsageError(
                    f"unknown key {key!r}{place}", where=where, fix=nearest(key, known)
                )
            wanted = known[key]
            is_axis = axes and isinstance(value, list) and key not in _NEVER_AXES
            if is_axis and not value:
                raise UsageError(f"{key} = [] leaves no cell", where=where, fix="name a value")
            for one in value if is_axis else [value]:
                self._check_kind(key, one, wanted, where)

    def _check_kind(self, key: str, value: Any, wanted: _Kinds, where: str) -> None:
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        if isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds):
            return
        raise UsageError(
            f"{key} = {value!r} has the wrong type",
            where=where,
            fix="it should be " + " or ".join(kind.__name__ for kind in kinds),
        )


def _expand(source: _Source, given: dict[str, Any], grids: Any) -> Iterator[dict[str, Any]]:
    """Yield the options of every cell, without repetitions."""
    seen = set()
    for nth, grid in enumerate(grids or [{}]):
        source.check(grid, RUN_KEYS, "[[grid]]", nth, axes=True)
        axes = {key: _axis(key, value) for key, value in grid.items()}
        for combination in itertools.product(*axes.values()):
            cell = {**given, **dict(zip(axes, combination, strict=True))}
            if isinstance(given.get("set"), dict) and isinstance(cell.get("set"), dict):
                cell["set"] = {**given["set"], **cell["set"]}
            key = json.dumps(cell, sort_keys=True)
            if key not in seen:
                seen.add(key)
                yield cell


def _axis(key: str, value: Any) -> list[Any]:
    """Return the values of one key of a grid; in `set`, every option may be an axis."""
    if key in _NEVER_AXES:
        return [value]
    if isinstance(value, dict):
        inner = {name: _axis(name, one) for name, one in value.items()}
        return [dict(zip(inner, one, strict=True)) for one in itertools.product(*inner.values())]
    return value if isinstance(value, list) else [value]


def _cells(source: _Source, options: Iterable[dict[str, Any]]) -> tuple[RecipeCell, ...]:
    cells = []
    for number, given in enumerate(options, 1):
        try:
            cells.append(RecipeCell(number, given, with_defaults(given)))
        except PrunebenchError as error:
            raise UsageError(
                error.what, where=f"{source.path}, cell {number}: {_brief(given)}", fix=error.fix
            ) from None
    return tuple(cells)


def _brief(given: Mapping[str, Any]) -> str:
    keys = ("method", "sparsity", "model", "allocation")
    return ", ".join(f"{key} {given[key]}" for key in keys if key in given)


def _expectations(
    source: _Source, entries: Any, cells: Sequence[RecipeCell]
) -> Iterator[Expectation]:
    for nth, entry in enumerate(entries):
        source.check(entry, _EXPECT, "[[expect]]", nth)
        where = source.at("", "[[expect]]", nth)
        if "tolerance" not in entry:
            raise UsageError("an expectation has no tolerance", where=where, fix="tolerance = 0.02")
        values = _of_paper(entry, where) if "paper" in entry else [_measured(entry, cells, where)]
        met = [value for value in values if any(cell.scores(value) for cell in cells)]
        if not met:
            raise UsageError(
                "an expectation that no cell of the recipe can meet",
                where=where,
                fix="check paper, table, model, method, sparsity, and the texts or tasks",
            )
        for value in met:
            yield Expectation(value, float(entry["tolerance"]))


def _of_paper(entry: dict[str, Any], where: str) -> list[PublishedValue]:
    wrong = set(entry) & {"value", "protocol", "allocation"}
    if wrong:
        raise UsageError(
            f"{min(wrong)!r} does not go with paper", where=where, fix="the table has the values"
        )
    values = [value for value in published_values() if value.paper == entry["paper"]]
    if not values:
        papers = {value.paper for value in published_values()}
        raise UsageError(
            f"no published value of arXiv {entry['paper']}", where=where,
            fix=nearest(entry["paper"], papers),
        )  # fmt: skip
    if "table" in entry:
        wanted = [entry["table"]] if isinstance(entry["table"], str) else entry["table"]
        for table in wanted:
            if table not in {value.table for value in values}:
                raise UsageError(
                    f"arXiv {entry['paper']} has no {table!r}", where=where,
                    fix=nearest(str(table), {value.table for value in values}),
                )  # fmt: skip
        values = [value for value in values if value.table in wanted]
    for key in ("method", "model", "metric", "sparsity"):
        if key in entry:
            values = [value for value in values if getattr(value, key) == str(entry[key])]
    return values


def _measured(entry: dict[str, Any], cells: Sequence[RecipeCell], where: str) -> PublishedValue:
    missing = [key for key in ("method", "sparsity", "protocol", "value") if key not in entry]
    if missing:
        raise UsageError(
            f"an expectation has no {missing[0]!r}", where=where,
            fix="give paper (and table), or method, sparsity, protocol and value",
        )  # fmt: skip
    return PublishedValue(
        method=entry["method"],
        model=entry.get("model", cells[0].values["model"]),
        sparsity=str(entry["sparsity"]),
        allocation=entry.get("allocation", "uniform"),
        metric=entry.get("metric", "token_ppl"),
        protocol=entry["protocol"],
        value=float(entry["value"]),
        source=entry.get("source", "this recipe"),
    )


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
