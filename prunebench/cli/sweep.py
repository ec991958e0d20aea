"""`prunebench sweep` and `prunebench validate`: recipes, run and checked."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunebench.cli.console import print_command, print_hanging
from prunebench.cli.engine import Voice, check_engine, open_engine
from prunebench.cli.exit_codes import command_line, say
from prunebench.cli.progress import choose_progress
from prunebench.cli.published import print_twins, twin_record
from prunebench.cli.summary import short_title
from prunebench.cli.table import print_overview
from prunebench.errors import CheckFailed, PrunebenchError, SomeCellsFailed
from prunebench.results.compare import compare
from prunebench.results.overview import overview
from prunebench.results.published import Twin, find_twins
from prunebench.results.render import value_text
from prunebench.sweep.cell import RecipeCell
from prunebench.sweep.expectations import Expectation
from prunebench.sweep.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from prunebench.sweep.sweep import CellOutcome, Sweep


def validate_command(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes, as in recipes/*.toml.")],
) -> None:
    """Check recipes: keys, names, options and expectations, without a model or a network."""
    failed = 0
    for path in recipes:
        try:
            _print_checked(_checked(path))
        except PrunebenchError as error:
            failed += 1
            say(f"{path}: {error.what}")
            for line in (error.where, error.fix):
                if line:
                    say(f"  {line}")
    if failed:
        raise typer.Exit(2)


def _checked(path: Path) -> Recipe:
    from prunebench.run.names import check_names
    from prunebench.spec import Setup

    recipe = read_recipe(path, complete=True)
    for cell in recipe.cells:
        try:
            check_names(cell.spec, Setup())
        except PrunebenchError as error:
            # `check_names` knows one spec: add which cell of the recipe it was
            error.where = " / ".join(
                filter(None, (f"cell {cell.number}, {cell.name}", error.where))
            )
            raise
    return recipe


def _print_checked(recipe: Recipe) -> None:
    models = dict.fromkeys(cell.values["model"] for cell in recipe.cells)
    print_hanging(f"{recipe.path}: ", recipe.about)
    print_hanging(f"  {_count(len(recipe.cells), 'cell')} on ", ", ".join(models))
    typer.echo(f"  {_count(len(recipe.expectations), 'expected value')}")
    if recipe.gpu_memory_gb:
        sizes = ", ".join(f"{name} {size:g} GB" for name, size in recipe.gpu_memory_gb.items())
        print_hanging("  GPU memory (computed): ", sizes)
    if recipe.time:
        print_hanging("  time: ", recipe.time)


def sweep_command(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).")],
    selectors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE[,VALUE]]...",
            help="Which cells: an option of run and its values, as in model=llama2-7b, or an "
            "option that the recipe sets, as in set.steps=12.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only the I-th of N equal parts of the cells.")
    ] = "1/1",
    executor: Annotated[
        str, typer.Option(help="Where cells run: local, slurm (submitit), or ray.")
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, show_default=False,
            help="How many cells at a time, each with a GPU or threads of its own. (default: 1; "
            "slurm and ray: all)",
        ),
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", show_default=False,
            help="What a cell asks of Slurm or Ray: gpus, cpus, memory_gb, time, partition, "
            "account, qos, constraint; may be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be run, and run nothing.")
    ] = False,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="As in prunebench run.")
    ] = False,
    results_dir: Annotated[
        Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
    ] = Path("results"),
    device: Annotated[
        str, typer.Option(envvar="PRUNEBENCH_DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(envvar="PRUNEBENCH_BATCH_SIZE", min=1, help="As in prunebench run."),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(envvar="PRUNEBENCH_INCLUDE_PATH", metavar="DIR", help="As in prunebench run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:  # fmt: skip
    """Run the cells of a recipe that are not finished yet, each in a process of its own.

    After an interruption the same command resumes. A cell that fails is tried once more.
    It ends with exit code 8 if cells failed, and with 6 if a value that the recipe expects is
    missed.
    """
    asked = check_engine(executor, resource or [])
    from prunebench.spec import Setup

    # imports torch: after the cheap check of the executor, and not for `validate`
    from prunebench.sweep.requirements import needs_gpu, require_resources
    from prunebench.sweep.sweep import Sweep, parse_shard
    from prunebench.sweep.sweep import shard as part_of

    part, parts = parse_shard(shard)
    recipe = _checked(recipe_path)
    selected = recipe.select(selectors or [])
    cells = part_of(selected, part, parts)
    if not dry_run:
        require_resources(recipe, cells, device=device, here=executor == "local")
    # progress is silent here: resolving the cells would print a line for each; the cells print
    # their own
    setup = Setup(
        results_dir=results_dir, device=device, batch_size=batch_size, include_path=include_path,
        log_samples=log_samples, progress=choose_progress(quiet=True),
    )  # fmt: skip
    voice = Voice(cells, side_by_side=executor == "local" and (jobs or 1) > 1, quiet=quiet)
    # --resource overrides the recipe
    gpus = {**recipe.resources, **asked}.get("gpus", 0)
    on_gpu = bool(gpus) or needs_gpu(recipe, cells, device=device)
    if dry_run:
        sweep = Sweep(setup, here=executor == "local", on_gpu=on_gpu)
        outcomes = _dry(sweep, cells)
    else:
        engine = open_engine(executor, asked, recipe, cells, jobs=jobs, device=device, voice=voice)
        sweep = Sweep(setup, engine=engine, tell=voice.tell, on_gpu=on_gpu)
        outcomes = _run(sweep, cells, voice)
    twins, without = _twins(recipe, outcomes)
    if as_json:
        _print_json(sweep, outcomes, twins)
    elif not cells:
        typer.echo(f"--shard {shard} is empty: {_count(len(selected), 'cell')} in {parts} parts")
    else:
        _print_summary(sweep, outcomes, twins, dry_run=dry_run)
    _raise_if_missed(outcomes, twins, without)


def _run(sweep: Sweep, cells: Sequence[RecipeCell], voice: Voice) -> list[CellOutcome]:
    outcomes: list[CellOutcome] = []
    try:
        with (  # Ray writes to stdout, and stdout is for data
            contextlib.redirect_stdout(sys.stderr),
            # closing: a generator that is not exhausted ends its jobs only when it is closed
            contextlib.closing(sweep.run(cells)) as stream,
        ):
            for outcome in stream:
                outcomes.append(outcome)
                voice.tell(outcome.cell, _told(outcome))
    except KeyboardInterrupt:
        say("")
        say(f"interrupted with {len(outcomes)} of {_count(len(cells), 'cell')} done: finished "
            "results are saved, running cells were stopped")  # fmt: skip
        say(f"resume with: {command_line()}")
        raise typer.Exit(130) from None
    # cells end in any order; the summary follows the recipe
    return sorted(outcomes, key=lambda outcome: outcome.cell.number)


def _dry(sweep: Sweep, cells: Sequence[RecipeCell]) -> list[CellOutcome]:
    from prunebench.models.source import find_model, local_path
    from prunebench.sweep.sweep import CellOutcome

    outcomes = []
    for cell in cells:
        here = local_path(find_model(cell.values["model"])) is not None
        # resolving would fetch a model that is not on this machine, and its cell cannot be finished
        # here
        cell = sweep.with_dtype(cell) if here else cell
        result = sweep.finished(cell) if here else None
        outcomes.append(CellOutcome(cell, "finished" if result else "to run", result))
    return outcomes


def _told(outcome: CellOutcome) -> str:
    if outcome.state == "failed":
        again = f" ({outcome.tries} times)" if outcome.tries > 1 else ""
        return f"failed{again}: {outcome.reason}"
    if outcome.result is None:
        return outcome.state
    scores = ", ".join(
        f"{short_title(score)} {value_text(score.metric, score.value)}"
        for score in outcome.result.scores[:3]
    )
    if outcome.state == "finished":
        return f"finished before ({outcome.result.id}), {scores}"
    return f"{outcome.seconds:.0f} s, {scores}"


def _twins(recipe: Recipe, outcomes: Sequence[CellOutcome]) -> tuple[list[Twin], list[Expectation]]:
    """Return the expected values beside ours, and those whose cells ran without such a score."""
    twins: list[Twin] = []
    without: list[Expectation] = []
    for expectation in recipe.expectations:
        value = expectation.value
        results = [
            outcome.result for outcome in outcomes if outcome.result and outcome.cell.scores(value)
        ]
        if not results:
            continue
        # a recipe has the alias, a result may have the hub's name: without this no pair would be
        # found
        named = replace(value, model=results[0].spec.model)
        matches = find_twins(compare(results), [named], tolerance=expectation.tolerance)
        twins += matches
        without += [] if matches else [expectation]
    return twins, without


def _print_json(sweep: Sweep, outcomes: Sequence[CellOutcome], twins: Sequence[Twin]) -> None:
    cells = [
        {
            "number": outcome.cell.number,
            "command": shlex.join(sweep.command(outcome.cell)),
            "state": outcome.state,
            "result_id": outcome.result.id if outcome.result else None,
            "reason": outcome.reason or None,
            "tries": outcome.tries,
        }
        for outcome in outcomes
    ]
    document = {"cells": cells, "expectations": [twin_record(twin) for twin in twins]}
    typer.echo(json.dumps(document, indent=1))


def _print_summary(
    sweep: Sweep, outcomes: Sequence[CellOutcome], twins: Sequence[Twin], *, dry_run: bool
) -> None:
    results = [outcome.result for outcome in outcomes if outcome.result]
    if dry_run:
        for outcome in outcomes:
            print_command(f"{outcome.state:<8}  ", sweep.command(outcome.cell))
    elif results:
        print_overview(overview(compare(results), every_setting=True))
    if twins:
        print_twins(
            twins, title="expected by the recipe",
            legend="difference: ours minus expected; agrees: inside the recipe's tolerance or two "
            "deviations over seeds",
        )  # fmt: skip
    states = [outcome.state for outcome in outcomes]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    typer.echo(f"{_count(len(outcomes), 'cell')}: {', '.join(counts)}")


def _raise_if_missed(
    outcomes: Sequence[CellOutcome], twins: Sequence[Twin], without: Sequence[Expectation]
) -> None:
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        first = failed[0]
        raise SomeCellsFailed(
            f"{len(failed)} of {_count(len(outcomes), 'cell')} failed",
            where=f"first {first.cell.name}: {first.reason}",
            fix="the same command tries them again, and skips what is finished",
        )
    # before `missed`: an expectation that was never compared must not pass
    if without:
        value = without[0].value
        raise CheckFailed(
            f"{_count(len(without), 'expected value')} of the recipe met no score",
            where=f"first {value.method} {value.sparsity}: {value.metric} {value.protocol}",
            fix="correct the recipe: the table above names the protocols that were scored",
        )
    missed = [twin for twin in twins if twin.verdict == "worse"]
    if missed:
        raise CheckFailed(
            f"{len(missed)} of {_count(len(twins), 'expected value')} were missed",
            where="they are marked worse in the table above",
            fix="another machine, version or calibration text moves values: see the results",
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
