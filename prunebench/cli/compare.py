"""`prunebench compare`: the shared table."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prunebench.cli.console import wide_console
from prunebench.cli.exit_codes import say
from prunebench.cli.paired import compare_paired
from prunebench.cli.published import compare_published
from prunebench.cli.stored import require_results
from prunebench.errors import UsageError, nearest
from prunebench.results import render
from prunebench.results.bench_schema import read_benches
from prunebench.results.compare import Table, compare
from prunebench.results.selection import Selection
from prunebench.results.store import ResultStore

if TYPE_CHECKING:
    from rich.text import Text

_TITLE_WIDTH = 27  # wiki-sample/held-out/512/v1 in one line, lm-eval/... in two
_FORMATS = ("table", "md", "latex", "csv", "json")


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
    """Show results side by side: dense first, mean and deviation over seeds, best in bold."""
    if format_ not in _FORMATS:
        raise UsageError(f"unknown format {format_!r}", fix=nearest(format_, _FORMATS))
    if paired and published:
        raise UsageError("--paired and --published are two different tables", fix="choose one")
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
    elif as_json or format_ == "json":
        typer.echo(render.to_json(tables), nl=False)
    elif format_ == "csv":
        typer.echo(render.to_csv(tables), nl=False)
    elif format_ == "md":
        typer.echo(render.to_markdown(tables), nl=False)
    elif format_ == "latex":
        typer.echo(render.to_latex(tables), nl=False)
    else:
        print_tables(tables)
        failed = sum(result.status == "failed" for result in results)
        if failed:
            say(f"{failed} failed runs are not shown")
    if damaged:
        raise typer.Exit(4)


def _compare_paired(words: list[str], format_: str, results_dir: Path, *, as_json: bool) -> None:
    if format_ not in ("table", "json"):
        raise UsageError(f"--paired has no format {format_!r}", fix="use table or json")
    compare_paired(words, results_dir=results_dir, as_json=as_json or format_ == "json")


def _compare_published(tables: list[Table], format_: str, *, as_json: bool) -> None:
    if format_ not in ("table", "json"):
        raise UsageError(f"--published has no format {format_!r}", fix="use table or json")
    compare_published(tables, as_json=as_json or format_ == "json")


def print_tables(tables: list[Table]) -> None:
    """Print the tables on stdout, as wide as they need to be."""
    import rich.box
    import rich.table
    from rich.cells import cell_len
    from rich.text import Text

    console = wide_console()
    for table in tables:
        grid = rich.table.Table(
            title=table.model, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False
        )
        titles = [_broken(title) for title in render.header(table)]
        # NUL marks what is bold: it cannot occur in a text, where brackets or asterisks could
        rows = [render.row(table, cell, bold=("\0", "\0")) for cell in table.cells]
        widths = [
            # cell_len and not len: a wide character takes two columns
            max(cell_len(text.replace("\0", "")) for text in [*title.split("\n"), *texts])
            for title, *texts in zip(titles, *rows, strict=True)
        ]
        # padding on both sides and a divider between columns
        needed = sum(widths) + 3 * len(widths)
        if not sys.stdout.isatty():
            console.width = max(console.width, needed)  # a file or pipe has no width
        fits = needed <= console.width
        for i, (title, width) in enumerate(zip(titles, widths, strict=True)):
            side: Literal["left", "right"] = "left" if i < render.text_columns(table) else "right"
            if fits:  # rich would lay out every cell twice to find that
                grid.add_column(title, justify=side, no_wrap=True, width=width)
            else:
                grid.add_column(title, justify=side, overflow="fold")
        last = ""
        for cell, texts in zip(table.cells, rows, strict=True):
            if last and cell.sparsity != last:
                grid.add_section()
            last = cell.sparsity
            grid.add_row(*map(_bold_between_marks, texts))
        console.print(grid)
        if table.ranked_by is None:
            console.print(
                f"{len(table.columns)} protocols: rows are not ranked. "
                "Choose one with protocol=... to rank them.",
                style="dim",
            )
    console.print(Text(render.legend(tables), style="dim"))


def _broken(title: str) -> str:
    """Put the metric above its protocol, and break that after slashes only."""
    metric, _, protocol = title.partition(" ")
    if "/" not in protocol:
        return title
    lines = [""]
    for part in re.findall("[^/]+/?", protocol):
        if len(lines[-1] + part) <= _TITLE_WIDTH:
            lines[-1] += part
        else:
            lines.append(part)
    return "\n".join([metric, *lines])


def _bold_between_marks(text: str) -> Text:
    from rich.text import Text

    parts = text.split("\0")
    return Text.assemble(*((part, "bold green" if i % 2 else "") for i, part in enumerate(parts)))
