"""Write docs/cli.md from the commands and their options, and the README's table from the results.

The defaults of options go to `prunebench/results/option_defaults.json`, for tables.

`make docs` runs it. Typer's own generator sees commands that are imported when they are called as
empty.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from prunebench.allocators import ALLOCATORS
from prunebench.allocators import BUILTIN as BUILTIN_ALLOCATORS
from prunebench.cli import app
from prunebench.pruners import BUILTIN as BUILTIN_METHODS
from prunebench.pruners import METHODS
from prunebench.pruners.maskllm.presets import PRESETS
from prunebench.recovery import BUILTIN as BUILTIN_RECOVERERS
from prunebench.recovery import RECOVERERS
from prunebench.recovery.distill.options import PRESETS as DISTILL_PRESETS
from prunebench.registry import Registry
from prunebench.run_options import RUN_OPTIONS

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "cli.md", ROOT / "README.md"
DEFAULTS = ROOT / "prunebench" / "results" / "option_defaults.json"

HEADER = """\
# Commands and options

<!-- Written by `make docs` from the commands themselves; a test fails where it is not fresh. -->

`prunebench COMMAND --help` says the same in a terminal. Data goes to stdout, progress to stderr;
`--json` prints one document. Where the environment can set an option, the variable ends its row. A
recipe holds options of `run` by their names, with underscores: see [recipes](recipes.md).
"""

FOOTER = """\
## Precedence

A flag goes before the environment, the environment before the recipe (`run --recipe FILE.toml`),
the recipe before the default. `run --show-config` prints every value and where it comes from:

    prunebench run --method wanda --show-config

## Exit codes

| code | meaning |
|---:|---|
| 0 | done |
| 1 | a bug of prunebench: please report it |
| 2 | a wrong option, name or recipe |
| 3 | a model, a text, a package or the network is missing |
| 4 | data is damaged, or does not fit the request |
| 5 | something could not be saved |
| 6 | a check failed, or a value that a recipe expects was missed |
| 7 | out of memory |
| 8 | a sweep finished, and some of its cells failed |
| 130 | interrupted; where work was saved, the same command resumes |

An error has three lines: what, where or why, what to do. `PRUNEBENCH_DEBUG=1`, or `--debug` where a
command has it, shows the traceback.

## Other variables

| variable | meaning |
|---|---|
| `PRUNEBENCH_CACHE` | folder of downloads, gradients, measured kernels and interrupted runs |
| `PRUNEBENCH_TRITON=0` | MaskLLM in plain PyTorch on a GPU, without the Triton kernels |
| `HF_HUB_OFFLINE=1` | use only what lies in the cache of the Hugging Face hub |
| `NO_COLOR=1` | no colors |
"""


def readme() -> str:
    """Return the README with the table as `compare` prints it at 80 columns."""

    def output(match: re.Match[str]) -> str:
        words = [*shlex.split(match[2]), "--results-dir", str(ROOT / "results")]
        outcome = CliRunner().invoke(app, words, env={"COLUMNS": "80", "NO_COLOR": "1"})
        if outcome.exit_code:
            raise RuntimeError(outcome.output)
        lines = [line.rstrip() for line in outcome.stdout.splitlines()]
        return "\n".join([match[1], *lines]).rstrip() + "\n```"

    text = README.read_text(encoding="utf-8")
    return re.sub(
        r"(    prunebench (compare [^#\n]*?)\n\n```text)\n.*?\n```", output, text, flags=re.S
    )


def defaults() -> str:
    """Return the defaults of all options but seeds, with each preset a name of its own, as JSON."""
    kinds = {
        "method": (METHODS, BUILTIN_METHODS),
        "allocation": (ALLOCATORS, BUILTIN_ALLOCATORS),
        "recover": (RECOVERERS, BUILTIN_RECOVERERS),
    }
    table = {
        kind: {name: _defaults_of(registry.load(name)) for name in rows}
        for kind, (registry, rows) in kinds.items()
    }
    # an option that is None there has the value of the preset
    presets = {("method", "maskllm"): PRESETS, ("recover", "distill"): DISTILL_PRESETS}
    for (kind, name), of_name in presets.items():
        plain = table[kind][name]
        for preset, values in of_name.items():
            table[kind][f"{name}/{preset}"] = {**plain, **values, "preset": plain["preset"]}
        table[kind][name] = table[kind][f"{name}/{plain['preset']}"]
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


def _defaults_of(cls: Any) -> dict[str, Any]:
    return {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.init and field.name != "seed" and field.default is not dataclasses.MISSING
    }


def page() -> str:
    """Return the whole page."""
    commands = dict(_commands(get_command(app)))
    index = [[f"[`{name}`](#{_anchor(name)})", _cell(_about(c))] for name, c in commands.items()]
    lines = [HEADER, *_table(["command", "what it does"], index)]
    for name, command in commands.items():
        lines += _section(name, command)
    lines += [
        "## Options of methods",
        "",
        "Given as `--set KEY=VALUE`. A method that is not listed has none.",
        "",
        *_registry_sections(METHODS, BUILTIN_METHODS),
        "### Presets of maskllm",
        "",
        "An option without a default above has the value of the preset.",
        "",
        *_preset_table(),
        "## Options of allocators",
        "",
        "Given as `--set allocation.KEY=VALUE`.",
        "",
        *_registry_sections(ALLOCATORS, BUILTIN_ALLOCATORS),
        "## Options of recoverers",
        "",
        "Given as `--set recover.KEY=VALUE`.",
        "",
        *_registry_sections(RECOVERERS, BUILTIN_RECOVERERS),
    ]
    return "\n".join([*lines, FOOTER])


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command below a group, with its full name."""
    for name, stub in group.commands.items():
        command = getattr(stub, "command", stub)  # a lazy command is imported here
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _section(name: str, command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(["prunebench", name, *map(_placeholder, arguments), "[OPTIONS]"])
    about = re.sub(r"[ \n]*\n\n\s*|\s*\n\s*", lambda m: "\n\n" if "\n\n" in m[0] else "\n",
                   inspect.cleandoc(command.help or ""))  # fmt: skip
    lines = [f"## {name}", "", f"```\n{usage}\n```", "", about.replace("<", "&lt;"), ""]
    if arguments:
        rows = [[_code(_placeholder(p)), *_facts(p)] for p in arguments]
        lines += _table(["argument", "default", "what"], rows)
    panels: dict[str, list[list[str]]] = {}
    for option in options:
        panels.setdefault(option.rich_help_panel or "", []).append(_option(option))
    for panel, rows in panels.items():
        lines += [f"**{panel}**", ""] if panel else []
        lines += _table(["option", "default", "what"], rows)
    return lines


def _option(option: Any) -> list[str]:
    names = sorted([*option.opts, *option.secondary_opts], key=len, reverse=True)
    value = "" if option.is_flag else f" {_placeholder(option)}"
    return [", ".join(_code(name + value * (name == names[0])) for name in names), *_facts(option)]


def _facts(parameter: Any) -> list[str]:
    """Return default and help of a parameter, its environment variable included."""
    about = RUN_OPTIONS.get(parameter.name) if parameter.rich_help_panel else None
    text, default = parameter.help or "", ""
    if about:
        text, default = about.about.help, about.default_text
    elif words := re.search(r"\s*\(default: (.*)\)\s*$", text):
        # the default in words, where the signature holds None
        text, default = text[: words.start()], words[1]
    elif parameter.required:
        default = "required"
    elif parameter.show_default and parameter.default not in (None, False, ()):
        default = str(parameter.default)
    variable = f" {_code(parameter.envvar)}" if parameter.envvar else ""
    return [_cell(default), _cell(text) + variable]


def _placeholder(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.param_type_name == "argument":
        word = parameter.name.upper().replace("_", "-") + ("..." if parameter.nargs == -1 else "")
        return word if parameter.required else f"[{word}]"
    kind = str(parameter.type_descriptor.annotation)
    return next((w for k, w in {"int": "N", "Path": "PATH"}.items() if k in kind), "TEXT")


def _registry_sections(registry: Registry[Any], builtin: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name in builtin:
        cls = registry.load(name)
        rows = _fields(cls, _attributes(cls))
        lines += [f"### {name}", "", *_table(["key", "default", "what"], rows)] if rows else []
    return lines


def _preset_table() -> list[str]:
    keys = PRESETS["paper"]
    rows = [[_code(key), *(str(preset[key]) for preset in PRESETS.values())] for key in keys]
    return _table(["key", *(f"`{name}`" for name in PRESETS)], rows)


def _fields(cls: Any, about: Mapping[str, str]) -> list[list[str]]:
    rows = []
    for field in dataclasses.fields(cls):
        if field.init:
            word = {None: "", dataclasses.MISSING: "required"}.get(
                field.default, str(field.default)
            )
            word = "the run's" if field.name == "seed" else word
            rows.append([_code(field.name), _cell(word), _cell(about.get(field.name, ""))])
    return rows


def _attributes(cls: type) -> dict[str, str]:
    """Return what the Google-style `Attributes:` of a class and its bases say of each field."""
    about: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(vars(base).get("__doc__") or "")
        section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
        entries = re.split(r"\n    (?=\S)", "\n" + section[1].rstrip()) if section else []
        for entry in filter(None, entries):
            names, _, words = entry.partition(":")
            about |= dict.fromkeys((name.strip() for name in names.split(",")), words)
    return about


def _about(command: Any) -> str:
    return str(command.help or "").strip().partition("\n\n")[0]


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table without the columns that are empty in every row."""
    used = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(line[i] for i in used)} |" for line in lines] + [""] if rows else []


if __name__ == "__main__":
    # the README's table is made with the defaults
    DEFAULTS.write_text(defaults(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
