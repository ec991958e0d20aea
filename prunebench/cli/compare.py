"""`prunebench compare`: the shared table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.exit_codes import say
from prunebench.cli.paired import compare_paired
from prunebench.cli.published import compare_published
from prunebench.cli.stored import require_results
from prunebench.cli.table import print_overview
from prunebench.errors import UsageError, nearest
from prunebench.results import render
from prunebench.results.bench_schema import read_benches
from prunebench.results.compare import Table, compare
from prunebench.results.overview import overview, require_column
from prunebench.results.selection import Selection
from prunebench.results.store import ResultStore

_FORMATS = ("table", "md", "latex", "csv", "json", "parquet")


def compare_command(
    selectors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE[,VALUE]]...",
            help="Which results: model=, method=, sparsity=, metric=, protocol=, dataset=, seed=, "
            "dtype=, calibration=, within_block=, device=, set.OPTION=; values may hold * and ?. "
            "With --paired: A [B] first.",
            show_default=False,
        ),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", "-f", help=f"One of {', '.join(_FORMATS)}.")
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    every_setting: Annotated[
        bool,
        typer.Option("--all", help="Show every setting of a method, and the dense model's row."),
    ] = False,
    columns: Annotated[
        str, typer.Option(help="Which columns, split by commas, as the last line names them.")
    ] = "",
    sort: Annotated[
        str, typer.Option(help="The column that orders the rows of a sparsity. (default: score)")
    ] = "",
    wide: Annotated[
        bool,
        typer.Option("--wide", help="Show all columns, wider than the terminal (| less -S)."),
    ] = False,
    paired: Annotated[
        bool,
        typer.Option(
            "--paired",
            help="Test two results (or one and its dense model) item by item, from the samples of "
            "--log-samples. Name them by id, by its beginning, or by path.",
        ),
    ] = False,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Show what papers print beside ours, where model, method, sparsity, metric and "
            "protocol agree.",
        ),
    ] = False,
    results_dir: Annotated[
        Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
    ] = Path("results"),
) -> None:
    """Show which method keeps how much at each sparsity, how sure that is, and what it cost."""
    if format_ not in _FORMATS:
        raise UsageError(f"unknown format {format_!r}", fix=nearest(format_, _FORMATS))
    if paired and published:
        raise UsageError("--paired and --published are two different tables", fix="choose one")
    short = {"--all": every_setting, "--columns": columns, "--sort": sort, "--wide": wide}
    whole = paired or published or as_json or format_ != "table"
    for option in (name for name, given in short.items() if given and whole):
        raise UsageError(
            f"{option} is an option of the table alone", fix="leave it out: other forms hold all"
        )
    if not (paired and any(Path(word).is_file() for word in selectors or [])):
        require_results(results_dir)
    if paired:
        _compare_paired(selectors or [], format_, results_dir, as_json=as_json)
        return
    selection = Selection.parse(selectors or [])
    results, damaged = ResultStore(results_dir).read(layers=False)
    for file in damaged:
        say(f"warning: {file.path} is skipped: {file.reason}")
    benches, broken = read_benches(results_dir)
    for path, reason in broken:
        say(f"warning: {path} is skipped: {reason}")
    tables = compare(results, selection, benches)
    if published:
        _compare_published(tables, format_, as_json=as_json)
    elif as_json or format_ != "table":
        _print_document(tables, "json" if as_json else format_)
    else:
        _print_table(tables, every_setting=every_setting, columns=columns, sort=sort, wide=wide)
        failed = sum(result.status == "failed" for result in results)
        if failed:
            say(f"{failed} failed runs are not shown")
    if damaged:
        raise typer.Exit(4)


def _print_document(tables: list[Table], format_: str) -> None:
    """Print all cells, with all that is known of them."""
    require_text(format_, terminal=sys.stdout.isatty())
    if format_ == "parquet":
        typer.echo(render.to_parquet(tables), nl=False)
        return
    texts = {
        "json": render.to_json, "csv": render.to_csv, "md": render.to_markdown,
        "latex": render.to_latex,
    }  # fmt: skip
    typer.echo(texts[format_](tables), nl=False)


def require_text(format_: str, *, terminal: bool) -> None:
    """Raise UsageError where a terminal would be sent what is no text."""
    if format_ == "parquet" and terminal:
        raise UsageError(
            "parquet is no text", fix="add > FILE, as in --format parquet > rows.parquet"
        )


def _print_table(
    tables: list[Table], *, every_setting: bool, columns: str, sort: str, wide: bool
) -> None:
    keys = [key.strip() for key in columns.split(",") if key.strip()]
    short = overview(
        tables, every_setting=every_setting, dense_rows=every_setting or wide, sort=sort or None
    )
    for key in keys:
        require_column(key, short.blocks)
    print_overview(short, columns=keys, wide=wide)


def _compare_paired(words: list[str], format_: str, results_dir: Path, *, as_json: bool) -> None:
    if format_ not in ("table", "json"):
        raise UsageError(f"--paired has no format {format_!r}", fix="use table or json")
    compare_paired(words, results_dir=results_dir, as_json=as_json or format_ == "json")


def _compare_published(tables: list[Table], format_: str, *, as_json: bool) -> None:
    if format_ not in ("table", "json"):
        raise UsageError(f"--published has no format {format_!r}", fix="use table or json")
    compare_published(tables, as_json=as_json or format_ == "json")
