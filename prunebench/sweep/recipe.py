"""Recipes: TOML files with one run or a grid of them, and expected values.

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

    [needs]                         # checked before a sweep starts
    gpu_memory_gb = { llama2-7b = 19 }
    time = "not measured"

    [resources]                     # requested per cell from Slurm or Ray; --resource overrides
    gpus = 1
    time = "4:00:00"

`ppl` and `tasks` are lists of names and never axes. TOML and not YAML: YAML 1.1 reads a bare `2:4`
as the number 124.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunebench.errors import PrunebenchError, UsageError, nearest
from prunebench.results.selection import OPTION, read_selectors
from prunebench.run_options import RUN_KEYS, with_defaults
from prunebench.sweep.cell import RecipeCell, flat_options, option_word
from prunebench.sweep.engines.job import RESOURCE_KEYS, Resources
from prunebench.sweep.expectations import Expectation, read_expectations
from prunebench.sweep.toml_source import NEVER_AXES, Kinds, RecipeSource

_TOP: dict[str, Kinds] = {
    **RUN_KEYS, "about": str, "grid": list, "expect": list, "needs": dict, "resources": dict,
}  # fmt: skip
_NEEDS: dict[str, Kinds] = {"gpu_memory_gb": dict, "time": str}


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been read and checked as far as it can be without a model.

    Attributes:
        about: What it is for.
        cells: Its runs, in the order of the file.
        expectations: Expected values.
        gpu_memory_gb: GPU memory for each model, as far as the recipe has it.
        time: Free text about its duration.
        resources: Requested per cell from a cluster, by the keys of `--resource`.
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
        options = {
            OPTION + name
            for cell in self.cells
            for name, _ in flat_options(cell.given.get("set", {}))
        }
        selectors = options | RUN_KEYS.keys() - {"set"}
        filters = read_selectors(words)
        for key in filters:
            if key not in selectors:
                raise UsageError(f"unknown selector {key!r}", fix=nearest(key, selectors))
        chosen = [cell for cell in self.cells if cell.matches(filters)]
        if not chosen:
            raise self._nothing_selected(filters)
        return chosen

    def _nothing_selected(self, filters: Mapping[str, Sequence[str]]) -> UsageError:
        """Return the error: the value that no cell has, or the values that no cell has together."""
        for key, patterns in filters.items():
            # a typo is likelier than a combination that is missing: look for it first
            if not any(cell.matches({key: patterns}) for cell in self.cells):
                there = {option_word(value) for cell in self.cells for value in cell.value(key)}
                return UsageError(
                    f"no cell of {self.path} has {key} {','.join(patterns)}",
                    fix=nearest(patterns[0], there),
                )
        # every value occurs in some cell: add the filters one by one, and name the first that
        # leaves nothing
        so_far: dict[str, Sequence[str]] = {}
        for key, patterns in filters.items():
            cells = [cell for cell in self.cells if cell.matches(so_far)]
            together = so_far | {key: patterns}
            if not any(cell.matches(together) for cell in cells):
                break
            so_far = together
        words = [f"{name}={','.join(values)}" for name, values in together.items()]
        there = {option_word(value) for cell in cells for value in cell.value(key)}
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
        UsageError: It cannot be read, is not TOML, or has an unknown key; the error names file,
            line and the nearest key.
    """
    source = RecipeSource(path)
    table = source.table
    source.check(table, _TOP, "")
    given = {key: value for key, value in table.items() if key in RUN_KEYS}
    grids = table.get("grid", [])
    if not grids and not complete:
        # both speak of whole cells, so a recipe that has them must be complete
        needless = [key for key in ("expect", "needs") if key in table]
        # values stay empty: flags that are not known here may still name the method
        cells = (RecipeCell(1, given, {}),) if not needless else _cells(source, [given])
    else:
        # options at the top hold for every cell; a grid's own options override them
        cells = _cells(source, _expand(source, given, grids))
    needs = table.get("needs", {})
    source.check(needs, _NEEDS, "[needs]")
    memory = needs.get("gpu_memory_gb", {})
    source.check(memory, dict.fromkeys(memory, (int, float)), "[needs]")
    resources = table.get("resources", {})
    source.check(resources, RESOURCE_KEYS, "[resources]")
    try:
        Resources.of(resources)
    except UsageError as error:
        # `Resources.of` does not know the file: add where the numbers stand
        error.where = " / ".join(filter(None, (source.at("", "[resources]"), error.where)))
        raise
    return Recipe(
        path=path,
        about=table.get("about", ""),
        cells=cells,
        expectations=tuple(read_expectations(source, table.get("expect", []), cells)),
        gpu_memory_gb={model: float(size) for model, size in memory.items()},
        time=needs.get("time", ""),
        resources=resources,
    )


def _expand(source: RecipeSource, given: dict[str, Any], grids: Any) -> Iterator[dict[str, Any]]:
    """Yield the options of every cell, without repetitions."""
    # two grids may overlap (a common baseline): such a cell runs once
    seen = set()
    for nth, grid in enumerate(grids or [{}]):
        source.check(grid, RUN_KEYS, "[[grid]]", nth, axes=True)
        axes = {key: _axis(key, value) for key, value in grid.items()}
        for combination in itertools.product(*axes.values()):
            cell = {**given, **dict(zip(axes, combination, strict=True))}
            if isinstance(given.get("set"), dict) and isinstance(cell.get("set"), dict):
                # [set] is merged option by option; plain `**` would drop the options at the top
                cell["set"] = {**given["set"], **cell["set"]}
            # dicts and lists are not hashable, and the order of keys means nothing
            key = json.dumps(cell, sort_keys=True)
            if key not in seen:
                seen.add(key)
                yield cell


def _axis(key: str, value: Any) -> list[Any]:
    """Return the values of one key of a grid; in `set`, every option may be an axis."""
    if key in NEVER_AXES:
        return [value]
    if isinstance(value, dict):
        # {a = [1, 2], b = 3} becomes [{a: 1, b: 3}, {a: 2, b: 3}]
        inner = {name: _axis(name, option) for name, option in value.items()}
        return [
            dict(zip(inner, values, strict=True)) for values in itertools.product(*inner.values())
        ]
    return value if isinstance(value, list) else [value]


def _cells(source: RecipeSource, options: Iterable[dict[str, Any]]) -> tuple[RecipeCell, ...]:
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
    keys = ("method", "sparsity", "model", "allocation", "recover")
    return ", ".join(f"{key} {given[key]}" for key in keys if key in given)
