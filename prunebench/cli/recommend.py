"""`prunebench recommend`: the cheapest configuration that holds a floor on the user's own text."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunebench.cli.engine import Voice
from prunebench.cli.exit_codes import command_line, say
from prunebench.cli.progress import choose_progress
from prunebench.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from prunebench.recommend.race import Step
    from prunebench.recommend.search import Request, Search
    from prunebench.spec import Bos

_TASKS = "arc_easy,piqa,hellaswag,winogrande"


def recommend_command(
    floor: Annotated[
        str,
        typer.Option(
            help="ppl=1.25x: at most 1.25 times the perplexity of dense; recovery=95%: at least "
            "95% of its accuracy, mean over the tasks.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-M", envvar="PRUNEBENCH_MODEL",
            help="Alias, org/name of the hub, folder, or .gguf file.",
        ),
    ] = "smollm2-135m-q4",
    goal: Annotated[
        str,
        typer.Option(
            help="bytes: any form; 2:4: 2:4 alone; speed: 2:4 and fewer blocks. All by computed "
            "bytes.",
        ),
    ] = "bytes",
    budget: Annotated[str, typer.Option(help="90s, 30m or 2h.")] = "30m",
    text: Annotated[
        str, typer.Option(help="As --ppl of run: a name, file:PATH, file:PATH.jsonl.")
    ] = "wiki",
    tasks: Annotated[
        str, typer.Option(help="With a floor of recovery: tasks of lm-eval, split by commas.")
    ] = _TASKS,
    include_path: Annotated[
        Path | None,
        typer.Option(envvar="PRUNEBENCH_INCLUDE_PATH", metavar="DIR", help="As in prunebench run."),
    ] = None,
    calibration: Annotated[str, typer.Option(help="As in prunebench run.")] = "c4",
    calibration_samples: Annotated[
        int, typer.Option(min=3, help="Calibration windows of the last round.")
    ] = 96,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a calibration window.")] = 512,
    ppl_seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a perplexity window.")] = 512,
    bos: Annotated[
        str | None,
        typer.Option(
            help="text or window: --ppl-bos and --calibration-bos of run. (default: what the "
            "model needs)",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and of the methods.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the checkpoint of the chosen configuration."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what --save finds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rounds, candidates and times; run nothing.")
    ] = False,
    results_dir: Annotated[
        Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
    ] = Path("results"),
    device: Annotated[
        str, typer.Option(envvar="PRUNEBENCH_DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:  # fmt: skip
    """Find the cheapest configuration that holds a floor of quality on your text.

    It races: all candidates on little text first, the promising ones on more, the winner on a part
    of the text that no round has seen. Every step is a run with a row of its own; the same command
    resumes. It ends with exit code 6 if nothing holds the floor.
    """
    from prunebench.cli.recommendation import print_json, print_plan, print_report
    from prunebench.recommend.floor import Floor, parse_budget, parse_goal

    progress = choose_progress(quiet=quiet)
    # before torch is loaded: a typo should not cost half a minute
    wanted, goal_, seconds, begins = (
        Floor.parse(floor), parse_goal(goal), parse_budget(budget), _bos(bos),
    )  # fmt: skip
    with progress.stage("start", detail="loading torch and transformers"):
        from prunebench.recommend.search import Request, Search
        from prunebench.sweep.engines.local import LocalEngine
    request = Request(
        model=model, text=text, tasks=tuple(t.strip() for t in tasks.split(",") if t.strip()),
        calibration=calibration, calibration_samples=calibration_samples, seqlen=seqlen,
        ppl_seqlen=ppl_seqlen, seed=seed, results_dir=results_dir, device=device, save=save,
        force=force, command=command_line(), floor=wanted, goal=goal_, budget_seconds=seconds,
        bos=begins, include_path=include_path,
    )  # fmt: skip
    voice = Voice([], quiet=quiet)
    engine = LocalEngine([{}], show=lambda number, line: voice.note(line))
    search = Search(request, engine, progress)
    search.prepare()
    if dry_run:
        print_plan(search, as_json=as_json)
        return
    interrupted = _race(search, voice)
    if as_json:
        print_json(search, interrupted=interrupted)
    else:
        print_report(search, interrupted=interrupted)
    _raise_if_missed(search, request, interrupted=interrupted)


def _bos(text: str | None) -> Bos | None:
    if text is None:
        return None
    if text == "text":
        return "text"
    if text == "window":
        return "window"
    raise UsageError(f"--bos {text!r} is not known", fix="use text or window")


def _race(search: Search, voice: Voice) -> bool:
    """Run the race; returns whether Ctrl-C ended it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            search.run(lambda step, line: voice.note(_told(step, line)))
    except KeyboardInterrupt:
        return True
    return False


def _told(step: Step, line: str) -> str:
    stage = "unseen" if step.unseen else f"round {step.round + 1}"
    return f"[{stage}] {step.candidate.name}" + (f": {line}" if line else "")


def _raise_if_missed(search: Search, request: Request, *, interrupted: bool) -> None:
    if interrupted:
        say("")
        say("interrupted: finished rows are saved, the running one was stopped")
        say(f"resume with: {command_line()}")
        raise typer.Exit(130)
    if search.race.chosen:
        return
    nearest = search.race.nearest()
    where = "no run finished: see the table above"
    if nearest and nearest.value is not None:
        part = "unseen text" if nearest.step.unseen else "the text of the race"
        value = request.floor.text(nearest.value)
        where = f"the nearest is {nearest.step.candidate.name}: {value} on {part}"
    by = "within the budget" if search.cut else "of all candidates"
    failed = len(search.race.failed())
    if failed and nearest:
        where += f"; {failed} failed, and nothing is known of those"
    raise CheckFailed(
        f"nothing {by} holds the floor of {request.floor.about}",
        where=where,
        fix="use a longer --budget: the same command resumes" if search.cut
        else "use a lower floor, another --goal, or --calibration with text like yours",
    )  # fmt: skip
