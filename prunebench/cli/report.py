"""`prunebench report`: the shared table as one page, and its figures for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.exit_codes import say
from prunebench.cli.stored import require_results
from prunebench.errors import SaveError
from prunebench.files import require_writable, write_text
from prunebench.results.bench_schema import read_benches
from prunebench.results.report.libraries import require_libraries
from prunebench.results.selection import Selection
from prunebench.results.store import ResultStore

_DEFAULT = Path("report.html")


def report_command(
    selectors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE[,VALUE]]...",
            help="Which results, as in prunebench compare.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o",
            help="The page to write. (default: report.html, or no page where --figures is given)",
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Write the figures into this folder, as PDF, SVG and PNG."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    results_dir: Annotated[
        Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
    ] = Path("results"),
) -> None:  # fmt: skip
    """Write one page with tables, figures and provenance; it needs no network."""
    selection = Selection.parse(selectors or [])
    require_results(results_dir)
    require_libraries()
    page = output or (None if figures else _DEFAULT)
    if page:
        _require_free(page, force=force)
    results, damaged = ResultStore(results_dir).read()
    for file in damaged:
        say(f"warning: {file.path} is skipped: {file.reason}")
    benches, broken = read_benches(results_dir)
    for path, reason in broken:
        say(f"warning: {path} is skipped: {reason}")
    from prunebench.results.published import published_values
    from prunebench.results.report.data import build_report
    from prunebench.results.report.page import render_page

    files = [(file.path, file.reason) for file in damaged] + broken
    report = build_report(
        results,
        selection,
        benches=benches,
        published=published_values(),
        skipped=[(path.relative_to(results_dir).as_posix(), reason) for path, reason in files],
    )
    if figures:
        from prunebench.results.report.figures import figures_of, require_figures, write_figures

        drawn, left_out = figures_of(report)
        require_figures(figures, drawn, force=force)
        written = write_figures(figures, drawn)
        typer.echo(f"{figures}: {len(drawn)} figures in {len(written)} files")
        if left_out:
            say(f"{left_out} heat maps are left out: select fewer rows to have them")
    if page:
        write_text(page, render_page(report))
        typer.echo(str(page))
    if files:
        raise typer.Exit(4)


def _require_free(page: Path, *, force: bool) -> None:
    """Find out before the work whether the page can be written."""
    if page.is_dir():
        raise SaveError(f"{page} is a folder", fix=f"name a file, as in -o {page / _DEFAULT.name}")
    if page.exists() and not force:
        raise SaveError(f"{page} exists already", fix="name another file, or add --force")
    require_writable(page.parent)
