"""What `prunebench recommend` prints: its plan, and what the race has found."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import typer

from prunebench.cli.console import print_command, print_fitted, print_hanging
from prunebench.recommend.front import next_steps, pareto_front, smaller_failed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from prunebench.recommend.candidates import Candidate
    from prunebench.recommend.race import Step, Trial
    from prunebench.recommend.search import Search

_HALF_HOUR = 1800.0


def print_plan(search: Search, *, as_json: bool) -> None:
    """Print rounds and candidates, with the forecast of round 1, as `run --dry-run` makes it."""
    race = search.race
    rows: list[dict[str, Any]] = []
    with search.progress.stage(  # a matrix is pruned for each: minutes where they are large
        "forecast", total=len(race.candidates), unit="configurations"
    ) as advance:
        for c in race.candidates:
            rows.append({
                "name": c.name, "expected_bytes": c.expected_bytes,
                "expected_ratio": _ratio(search, c.expected_bytes),
                "forecast_seconds": search.forecast(c),
                "command": shlex.join(search.command(search.first_step(c))),
            })  # fmt: skip
            advance(1)
    if as_json:
        typer.echo(json.dumps({"about": search.about, "candidates": rows}, indent=1))
        return
    _print_head(search)
    for number, stage in enumerate(search.rounds, 1):
        typer.echo(f"  round {number}: {stage.samples} calibration windows, {search.scored(stage)}")
    typer.echo("")
    print_fitted(
        ("#", "configuration", "MB", "of dense", "round 1"),
        [
            (str(i), str(row["name"]), _mb(row["expected_bytes"]), f"{row['expected_ratio']:.3f}",
             _seconds(row["forecast_seconds"], missing="not forecast"))
            for i, row in enumerate(rows, 1)
        ],
        unbroken=("#", "configuration", "MB", "of dense", "round 1"),
        right=("#", "MB", "of dense", "round 1"),
    )  # fmt: skip
    typer.echo("")
    print_hanging(
        "  ", "sizes are computed; times are forecasts of pruning, recovery and scoring, without "
        "start-up; candidates that cannot be smaller than one that holds the floor are not run",
    )  # fmt: skip


def print_report(search: Search, *, interrupted: bool) -> None:
    """Print what was tried, the front, the chosen configuration, and what more time could buy."""
    race = search.race
    _print_head(search)
    typer.echo("")
    front = {id(trial) for trial in pareto_front(race)}
    measured = sorted(
        (c for c in race.candidates if race.latest(c)), key=lambda c: (race.size(c), race.excess(c))
    )
    if measured:
        value = "times dense" if race.floor.kind == "ppl" else "of dense acc"
        score = "ppl" if race.floor.kind == "ppl" else "accuracy"
        titles = ("front", "configuration", "MB", score, value, "round", "s", "outcome")
        print_fitted(
            titles, [_row(search, c, front) for c in measured],
            unbroken=titles[:-1], right=titles[2:-1],
        )  # fmt: skip
        typer.echo("")
        print_hanging(
            "  ", "front: nothing tried is both smaller and better, each measured on the text of "
            "its last round; MB is computed; s: of all its runs",
        )  # fmt: skip
    _print_not_run(search, interrupted=interrupted)
    _print_chosen(search)
    _print_next(search, interrupted=interrupted)


def print_json(search: Search, *, interrupted: bool) -> None:
    """Print one document."""
    race = search.race
    chosen, nearest = race.chosen, race.nearest()
    document = {
        "about": search.about,
        "floor": {"kind": race.floor.kind, "limit": race.floor.limit},
        "chosen": chosen and _record(chosen),
        "command": shlex.join(search.command(chosen.step)) if chosen else None,
        "nearest": nearest and _record(nearest),
        "trials": [_record(trial) for trial in race.trials],
        "front": [trial.step.candidate.name for trial in pareto_front(race)],
        "dropped": race.drops,
        "not_run": [c.name for c in race.candidates if race.latest(c) is None],
        "next": [
            {"name": s.candidate.name, "round": s.round + 1, "expected_seconds": search.expected(s)}
            for s in _next(search)
        ],
        "interrupted": interrupted,
        "cut_by_budget": search.cut is not None,
    }
    typer.echo(json.dumps(document, indent=1))


def _print_head(search: Search) -> None:
    first, *others = search.about
    print_hanging("", first)
    for line in others:
        print_hanging("  ", line)


def _row(search: Search, candidate: Candidate, front: set[int]) -> tuple[str, ...]:
    race = search.race
    trial = race.latest(candidate)
    assert trial is not None
    own = [t for t in race.trials if t.step.candidate is candidate]
    seconds = _seconds(sum(t.total_seconds for t in own))
    if trial.value is None:
        size = _mb(candidate.expected_bytes)
        return ("", candidate.name, size, "-", "-", str(trial.step.round + 1), seconds,
                race.drops[candidate.name])  # fmt: skip
    return (
        "*" if id(trial) in front else "", candidate.name, _mb(trial.size_bytes),
        f"{trial.score:,.4g}" if race.floor.kind == "ppl" else f"{trial.score:.4f}",
        race.floor.text(trial.value), str(trial.step.round + 1), seconds,
        _outcome(search, candidate),
    )  # fmt: skip


def _outcome(search: Search, candidate: Candidate) -> str:
    race = search.race
    if race.chosen and race.chosen.step.candidate is candidate:
        return "chosen"
    if candidate.name in race.drops:
        return race.drops[candidate.name]
    if race.holds(candidate):
        leader = race.chosen.step.candidate if race.chosen else race.leader()
        if leader is None or leader is candidate:
            return "holds the floor, not confirmed"
        if race.size(candidate) == race.size(leader):
            return "holds the floor; as large as the best"
        return "holds the floor; larger"
    return "above the floor" if race.floor.kind == "ppl" else "below the floor"


def _print_not_run(search: Search, *, interrupted: bool) -> None:
    race = search.race
    rest = [c for c in race.candidates if race.latest(c) is None]
    larger = [c.name for c in rest if race.larger(c)]
    others = [c.name for c in rest if not race.larger(c)]
    if larger:
        typer.echo("  not run, since none can be smaller than what holds the floor:")
        print_hanging("    ", "; ".join(larger))
    if others:
        typer.echo(f"  not run ({'interrupted' if interrupted else 'the budget'}):")
        print_hanging("    ", "; ".join(others))


def _print_chosen(search: Search) -> None:
    race = search.race
    typer.echo("")
    chosen = race.chosen
    if chosen is None:
        nearest = race.nearest()
        if nearest and nearest.value is not None:
            part = "unseen text" if nearest.step.unseen else "the text of the race"
            print_hanging(
                "nothing holds the floor yet; the nearest: ",
                f"{nearest.step.candidate.name}, {race.floor.text(nearest.value)} on {part}",
            )
        return
    seen = race.latest(chosen.step.candidate)
    assert seen is not None and seen.value is not None and chosen.value is not None
    size = f"{_mb(chosen.size_bytes)} MB as {chosen.form}"
    ratio = _ratio(search, chosen.size_bytes)
    typer.secho(f"recommended: {chosen.step.candidate.name}", bold=True)
    print_hanging("  ", f"{size}, {ratio:.3f} of the dense model in 16 bits (computed)")
    unseen = "on unseen text"
    if race.floor.kind == "recovery":
        unseen = "on unseen questions, those behind the race's"
        if chosen.with_seen:
            unseen = "on all questions, the race's among them, for this run gave other weights"
    for name, trial in (("in the race", seen), (unseen, chosen)):
        assert trial.value is not None
        print_hanging(
            f"  {name}: ",
            f"{race.floor.text(trial.value)} ({trial.score:,.4g}, dense {trial.dense:,.4g}, "
            f"{trial.protocol})",
        )
    tries = sum(trial.step.unseen for trial in race.trials)
    if tries > 1:
        print_hanging("  ", f"it is number {tries} that was measured on the unseen text")
    if search.request.goal == "speed":
        print_hanging(
            "  ", "speed: not measured; the cost above is the bytes of weights that a token "
            "reads at most. prunebench bench measures",
        )  # fmt: skip
    print_hanging("  row: ", str(search.path_of(chosen)))
    if search.request.save:
        for line in _saved_lines(search.request.save, chosen):
            print_hanging("  ", line)
    print_command("  ", search.command(chosen.step))


def _saved_lines(folder: Path, chosen: Trial) -> list[str]:
    """Return what --save has written."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    lines = [f"checkpoint: {folder}, {size / 1e6:,.1f} MB, zeros and grid in plain tensors"]
    if "INT" not in chosen.form and chosen.form.startswith("2:4"):
        lines.append(
            f"packed: prunebench export {folder} --to packed24 -o DIR (16-bit checkpoints)"
        )
    return lines


def _next(search: Search) -> list[Step]:
    return next_steps(search.race, search.rounds, search.cut)


def _print_next(search: Search, *, interrupted: bool) -> None:
    steps = _next(search)
    failed = [candidate.name for candidate in smaller_failed(search.race)]
    typer.echo("")
    if not steps:
        but = ", but for what failed" if failed else ""
        typer.echo(f"another half hour: nothing smaller is left to try{but}")
    else:
        _print_steps(search, steps, interrupted=interrupted)
    if failed:
        print_hanging("  failed, and not known to miss the floor: ", "; ".join(failed))


def _print_steps(search: Search, steps: Sequence[Step], *, interrupted: bool) -> None:
    typer.echo("another half hour could buy:")
    spent = 0.0
    for step in steps:
        seconds = search.expected(step)
        spent += seconds or 0.0
        if spent > _HALF_HOUR:
            typer.echo(f"  (the rest of {len(steps)} takes longer)")
            break
        stage = search.rounds[step.round]
        trial = search.race.latest(step.candidate)
        last = ""
        if trial and trial.value is not None:
            last = f", {search.race.floor.text(trial.value)} so far"
        on = "the unseen text" if step.unseen else search.scored(stage)
        reads = f"{stage.samples} calibration windows, " if step.candidate.reads else ""
        print_hanging(
            f"  {step.candidate.name}: ",
            f"round {step.round + 1}, {reads}{on}, about {_seconds(seconds, missing='?')}{last}",
        )
    if not search.cut and not interrupted:
        print_hanging("  ", "(dropped by the race: run these with prunebench run or a recipe)")


def _record(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.step.candidate.name, "round": trial.step.round + 1,
        "unseen": trial.step.unseen, "value": trial.value, "score": _finite(trial.score),
        "dense": _finite(trial.dense), "protocol": trial.protocol or None,
        "size_bytes": trial.size_bytes or None, "form": trial.form or None,
        "result_id": trial.result_id or None, "reason": trial.reason or None,
        "seconds": trial.total_seconds, "was_there": trial.was_there,
        "with_seen": trial.with_seen,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return None if value != value else value


def _ratio(search: Search, size: int) -> float:
    return size / (2 * search.counts.parameters)


def _mb(size: Any) -> str:
    return f"{int(size) / 1e6:,.2f}" if int(size) < 10_000_000 else f"{int(size) / 1e6:,.1f}"


def _seconds(value: Any, *, missing: str = "-") -> str:
    if value is None:
        return missing
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
