"""`prunebench results`: the files behind the table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.exit_codes import guarded, say
from prunebench.errors import CheckFailed, IncompatibleData
from prunebench.files import write_text
from prunebench.results.compare import compare
from prunebench.results.overview import overview
from prunebench.results.overview_markdown import overview_markdown
from prunebench.results.render import to_markdown
from prunebench.results.schema import Result, json_schema
from prunebench.results.store import ResultStore

TABLE_NAME = "TABLE.md"
TABLE_HEAD = """# Results

Rebuilt from the result files beside it by `prunebench results table`; do not edit.

"""

_ALL_HEAD = """
# All settings and scores

"""

app = typer.Typer(
    help="Check and tabulate result files.", no_args_is_help=True, add_completion=False
)

_Folder = Annotated[
    Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
]


def table_text(results: list[Result]) -> str:
    """Return the text of `TABLE.md`, byte-stable for the same results."""
    tables = compare(results)
    return TABLE_HEAD + overview_markdown(overview(tables)) + _ALL_HEAD + to_markdown(tables)


def results_table(results_dir: _Folder = Path("results")) -> None:
    """Rebuild TABLE.md from the result files; if one is damaged, nothing is written."""
    results, damaged = ResultStore(results_dir).read()
    for file in damaged:
        say(f"warning: {file.path} is damaged: {file.reason}")
    if damaged:
        raise IncompatibleData(
            f"{len(damaged)} of {len(results) + len(damaged)} files are damaged",
            fix="mend or remove them: no table is written without them",
        )
    path = results_dir / TABLE_NAME
    write_text(path, table_text(results))
    typer.echo(str(path))


def results_check(
    results_dir: _Folder = Path("results"),
    current: Annotated[
        bool, typer.Option("--current", help="A stale result is an error (exit code 6).")
    ] = False,
) -> None:
    """Check every result file: schema, name, spec hash, and the versions of what made it.

    A result is stale where its method changed since, so that the same run gives other numbers, and
    no run of the same specification is there that is not.
    """
    results, damaged = ResultStore(results_dir).read()
    for file in damaged:
        say(f"{file.path}: {file.reason}")
    if damaged:
        raise CheckFailed(f"{len(damaged)} of {len(results) + len(damaged)} files are damaged")
    failed = sum(result.status == "failed" for result in results)
    typer.echo(f"{len(results)} results are sound, {failed} of them are failed runs")
    stale = _stale(results)
    for result in stale:
        say(f"{ResultStore(results_dir).path_of(result)}: stale: {result.stale}")
    if stale:
        typer.echo(f"{len(stale)} are stale: run their commands again, the newest counts")
    if stale and current:
        raise CheckFailed(f"{len(stale)} of {len(results)} results are stale")


def _stale(results: list[Result]) -> list[Result]:
    """Return the stale results of specifications that no later run measured again."""
    renewed = {r.spec_id for r in results if r.status == "ok" and not r.stale}
    return [r for r in results if r.status == "ok" and r.stale and r.spec_id not in renewed]


def results_schema() -> None:
    """Print the JSON Schema of a result."""
    typer.echo(json_schema(), nl=False)


app.command("table")(guarded(results_table))
app.command("check")(guarded(results_check))
app.command("schema")(guarded(results_schema))
