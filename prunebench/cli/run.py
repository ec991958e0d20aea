"""`prunebench run`: one spec from flags, environment, recipe and defaults, and its result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunebench.cli.exit_codes import command_line
from prunebench.cli.options import KEEP, PLACE, RUN, takes_options
from prunebench.errors import UsageError
from prunebench.run_options import RUN_OPTIONS, spec_of
from prunebench.spec import Setup

if TYPE_CHECKING:
    from prunebench.results.schema import Result


@takes_options(RUN_OPTIONS.values())
def run_command(
    ctx: typer.Context,
    *,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", rich_help_panel=RUN,
            help="An option of the method, or allocation.KEY=VALUE, or recover.KEY=VALUE; "
            "may be repeated.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            envvar="PRUNEBENCH_RECIPE", show_envvar=False, rich_help_panel=RUN,
            help="TOML file with any of the above.",
        ),
    ] = None,
    once: Annotated[
        bool,
        typer.Option(
            "--once", envvar="PRUNEBENCH_ONCE", show_envvar=False, rich_help_panel=KEEP,
            help="If a result of the same specification is saved already, show it and run nothing.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", rich_help_panel=PLACE, help="Check everything, load no weights."),
    ] = False,
    resume_info: Annotated[
        bool,
        typer.Option(
            "--resume-info", rich_help_panel=PLACE,
            help="Print what an interrupted run of this command has saved, and stop.",
        ),
    ] = False,
    show_config: Annotated[
        bool,
        typer.Option(
            "--show-config", rich_help_panel=PLACE,
            help="Print every value and where it comes from, and stop.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=PLACE, help="Print the result as JSON.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", rich_help_panel=PLACE, help="No progress on stderr.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", rich_help_panel=PLACE, help="Show tracebacks.")
    ] = False,
    **given: Any,
) -> None:  # fmt: skip
    """Prune a model, measure what it cost, and save the result.

    Every option but --set and --save-* may also be given as PRUNEBENCH_<OPTION> in the environment.
    """
    from prunebench.cli.config import collect, print_config, settle_dtype
    from prunebench.cli.dry_run import print_dry_run, print_resume_info
    from prunebench.cli.progress import choose_progress
    from prunebench.cli.summary import print_summary
    from prunebench.distributed import device_of, rank

    values, sources = collect(ctx, recipe)
    spec = spec_of(values)
    if show_config:
        settle_dtype(values, sources)
        print_config(values, sources, as_json=as_json)
        return
    # under torchrun every rank runs this; only rank 0 may print
    progress = choose_progress(quiet=quiet or rank() > 0)
    # fields of Setup: from `values` where a recipe may set them, else the flag
    placed = {name: values.get(name, given[name]) for name in given if name in vars(Setup())}
    placed |= {"device": device_of(values["device"]), "command": command_line()}
    setup = Setup(**placed, progress=progress)
    if resume_info:
        print_resume_info(spec, setup, as_json=as_json)
        return
    if dry_run:
        print_dry_run(spec, setup, as_json=as_json)
        return
    with progress.stage("start", detail="loading torch and transformers"):
        # imported inside the stage, as torch and transformers take seconds
        from prunebench.run.execute import execute as execute_plan
        from prunebench.run.plan import load_inputs
        from prunebench.run.resolve import resolve
    resolved = resolve(spec, setup)
    # after `resolve`: only contents have a spec_id that can be compared
    saved = _saved_result(resolved) if once else None
    if saved:
        progress.note(f"{saved.id} has the same specification: nothing is run")
    result = saved or execute_plan(load_inputs(resolved))
    if result is None:  # not rank 0
        return
    if as_json:
        sys.stdout.write(result.to_json())
    else:
        path = resolved.store.path_of(result)
        print_summary(result, path, setup, masks=resolved.pruner.needs.masks)


def _saved_result(resolved: Any) -> Result | None:
    """Return a finished result of the same specification for `--once`."""
    setup = resolved.setup
    if setup.log_text:
        raise UsageError(
            "--once does not go with --log-text",
            where="a saved result has the text that its run was asked for",
            fix="leave one of them out",
        )
    if any((setup.save_model, setup.save_masks, setup.save_calibration, setup.save_allocation)):
        raise UsageError(
            "--once does not go with --save-*",
            where="a saved result has no weights to save again",
            fix="leave --once out",
        )
    if setup.log_samples:
        raise UsageError(
            "--once does not go with --log-samples",
            where="a saved result has the answers that its run was asked to keep, or none",
            fix="leave one of them out",
        )
    result: Result | None = resolved.store.newest(resolved.spec, layers=True)
    return result
