"""The TOML text of a recipe: keys and types are checked, errors name file and line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunebench.errors import UsageError, nearest

Kinds = type | tuple[type, ...]
NEVER_AXES = ("ppl", "tasks")


class RecipeSource:
    """The text and the table of a recipe, with line numbers for error messages."""

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
        # tomllib gives no positions, so the line is searched for in the text; at worst it names the
        # section
        heads = [i for i, line in enumerate(lines) if line.strip().startswith(section)]
        # an inline table has no head: search from the top
        start = heads[nth] if section and nth < len(heads) else 0
        # `key =`, `"key" =`, `[key]`, `[[key]]` or `key.inner =`
        pattern = re.compile(rf"^\s*\[*\s*[\"']?{re.escape(key)}[\"']?\s*[=\].]")
        matches = (i for i in range(start, len(lines)) if pattern.match(lines[i]))
        return f"{self.path}, line {next(matches, start) + 1}"

    def check(
        self, table: Any, known: Mapping[str, Kinds], section: str, nth: int = 0, *,
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
            kinds = known[key]
            # of ppl and tasks a list is one value: several texts are scored in one run
            is_axis = axes and isinstance(value, list) and key not in NEVER_AXES
            if is_axis and not value:
                raise UsageError(f"{key} = [] leaves no cell", where=where, fix="name a value")
            for item in value if is_axis else [value]:
                self._check_kind(key, item, kinds, where)
            for item in value if key in NEVER_AXES and isinstance(value, list) else []:
                self._check_kind(key, item, str, where)

    def _check_kind(self, key: str, value: Any, expected: Kinds, where: str) -> None:
        types = expected if isinstance(expected, tuple) else (expected,)
        # bool is a subclass of int: `seed = true` would otherwise pass
        if isinstance(value, types) and not (isinstance(value, bool) and bool not in types):
            return
        raise UsageError(
            f"{key} = {value!r} has the wrong type",
            where=where,
            fix="it should be " + " or ".join(kind.__name__ for kind in types),
        )
