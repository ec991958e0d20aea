"""Run a race on a model: every step is a run whose row is filed as usual.

    search = Search(request, engine=..., progress=...)
    search.prepare()            # fetches model and text, runs nothing
    search.run(tell=...)        # until the floor, the end of the race, or the budget
    search.race.chosen

A step whose row is in the results folder already is not run again: that is all there is to
resuming. The budget only decides where the race is cut off, never what comes next.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunebench.calibration.bos import needs_window
from prunebench.calibration.texts import placed
from prunebench.errors import IncompatibleData, PrunebenchError, UsageError
from prunebench.evaluate.lm_eval_task import LmEvalTask
from prunebench.models.linears import find_linears
from prunebench.models.load import load_config, load_tokenizer, skeleton
from prunebench.models.source import fetch_model, find_model
from prunebench.progress import Progress, Silent
from prunebench.recommend.candidates import Candidate, ModelCounts, candidates_for
from prunebench.recommend.checkpoint import require_free, run_and_save, saved_result
from prunebench.recommend.floor import Floor, Goal
from prunebench.recommend.front import Round, expected_seconds
from prunebench.recommend.parts import Parts, split_text
from prunebench.recommend.race import Race, Step, Trial
from prunebench.recommend.values import perplexity_value, recovery_value, require_accuracy
from prunebench.results.schema import Result
from prunebench.results.sizes import size_of
from prunebench.results.store import ResultStore
from prunebench.run.forecast import forecast
from prunebench.run.plan import Plan, load_inputs
from prunebench.run_options import with_defaults
from prunebench.spec import Bos, Setup
from prunebench.sweep.cell import RecipeCell
from prunebench.sweep.engines import Engine
from prunebench.sweep.sweep import CellOutcome, Sweep

_SCORED = (8, 16, 32)  # windows of the rounds
_QUESTIONS = (25, 50, 100)  # of each task, in the rounds
_UNSEEN_QUESTIONS = 4  # times those of the last round are asked for the confirmation

Tell = Callable[[Step, str], None]


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        text: As `--ppl` takes it; with a floor of `recovery`, tasks stand in its place.
        tasks: Names of lm-eval tasks.
        calibration_samples: Windows of the last round; the first takes a twelfth, the second a
            third.
        bos: Where BOS stands; None for what the model needs.
        budget_seconds: From the start of the race.
        save: Folder of the chosen checkpoint, or None.
    """

    model: str
    floor: Floor
    goal: Goal
    text: str
    tasks: tuple[str, ...]
    calibration: str
    calibration_samples: int
    seqlen: int
    ppl_seqlen: int
    bos: Bos | None
    seed: int
    results_dir: Path
    device: str
    budget_seconds: float
    save: Path | None = None
    force: bool = False
    include_path: Path | None = None
    command: str = ""


@dataclass
class Search:
    """A race with the runs behind it.

    Attributes:
        cut: The step that the budget did not allow, if it was the budget that ended the race.
    """

    request: Request
    engine: Engine
    progress: Progress = field(default_factory=Silent)
    cut: Step | None = None

    def prepare(self) -> None:
        """Fetch model and text, split the text, and list the candidates.

        Raises:
            PrunebenchError: Something that was named is missing or does not fit.
        """
        ask = self.request
        source = find_model(ask.model)
        saved = saved_result(ask.save) if ask.save else None
        if ask.save and (saved is None or saved.spec.model != source.id):
            require_free(ask.save, force=ask.force)
        model = fetch_model(source, self.progress)
        config = load_config(model.path)
        needed = needs_window(config) or bool(source.entry and source.entry.bos == "window")
        self.bos: Bos = ask.bos or ("window" if needed else "text")
        self.parts: Parts | None = None
        self.tasks = ask.tasks
        scored: tuple[int, ...] = _QUESTIONS
        most = _QUESTIONS[-1] * _UNSEEN_QUESTIONS
        if ask.floor.kind == "ppl":
            with self.progress.stage("split", detail=ask.text):
                self.parts = split_text(
                    placed(ask.text, model=source.kind), load_tokenizer(model.path),
                    calibration=placed(ask.calibration, model=source.kind),
                    seqlen=ask.ppl_seqlen, bos=self.bos,
                    wanted=_SCORED[-1], seed=ask.seed, progress=self.progress,
                )  # fmt: skip
            scored = tuple(min(count, self.parts.race_windows) for count in _SCORED)
            most = self.parts.unseen_windows
        samples = ask.calibration_samples
        counts = (-(-samples // 12), -(-samples // 3), samples)
        self.rounds = [Round(n, m) for n, m in zip(counts, scored, strict=True)]
        self.unseen = most
        bare = skeleton(config)
        linears = find_linears(bare)
        self.counts = ModelCounts(
            parameters=sum(p.numel() for p in bare.parameters()),
            prunable=sum(linear.in_features * linear.out_features for linear in linears),
            widths=frozenset(linear.in_features for linear in linears),
        )
        self.race = Race(candidates_for(ask.goal, self.counts), ask.floor, len(self.rounds))
        self._setup = Setup(
            results_dir=ask.results_dir, device=ask.device, include_path=ask.include_path,
            progress=Silent(),
        )  # fmt: skip
        self._rows: dict[str, Result] = {}
        self._require_inputs()
        if ask.save and saved and not self._may_save(saved):
            require_free(ask.save, force=ask.force)

    def _require_inputs(self) -> None:
        """Refuse what every run would refuse: a mistake of the request, and of no candidate."""
        if self.parts is None and not self.tasks:
            raise UsageError("--tasks names no task", fix="as in --tasks arc_easy,piqa")
        with self.progress.stage("check", detail="calibration text and tasks"):
            plan = self._first_plan()
        self.tasks = plan.spec.tasks
        for task in plan.tasks:
            assert isinstance(task, LmEvalTask)
            require_accuracy(task, seen=self.rounds[-1].scored)

    def _first_plan(self) -> Plan:
        """Return the inputs of a candidate that reads data: they pass all checks of the others."""
        refusals: list[PrunebenchError] = []
        for candidate in [c for c in self.race.candidates if c.reads] or self.race.candidates:
            step = Step(candidate, len(self.rounds) - 1)
            try:
                return load_inputs(self._sweep().resolve(self.cell(step)))
            except (IncompatibleData, UsageError) as error:
                refusals.append(error)  # perhaps a width or a depth that does not fit this one
        raise refusals[0]

    @property
    def about(self) -> list[str]:
        """What is searched and on what, in lines for people."""
        ask = self.request
        lines = [f"{ask.model}: the smallest checkpoint with {ask.floor.about}"]
        if self.parts is not None:
            lines.append(
                f"{self.parts.about} ({self.parts.race_windows} and {self.parts.unseen_windows} "
                f"windows of {ask.ppl_seqlen} tokens); calibrated on {ask.calibration}"
            )
        else:
            lines.append(
                f"tasks {', '.join(self.tasks)}: raced on the first {self.rounds[-1].scored} "
                f"questions of each at most, confirmed on those behind them up to {self.unseen}; "
                f"calibrated on {ask.calibration}"
            )
        return lines

    def scored(self, stage: Round) -> str:
        """Return what a round scores, in words."""
        if self.parts is None:
            return f"{stage.scored} questions of each task"
        return f"{stage.scored} scored windows"

    def first_step(self, candidate: Candidate) -> Step:
        """Return a candidate's step of round 1."""
        return Step(candidate, 0)

    def forecast(self, candidate: Candidate) -> float | None:
        """Return the seconds of round 1 that `run --dry-run` would name, or None."""
        try:
            resolved = self._sweep().resolve(self.cell(Step(candidate, 0)))
            seconds = forecast(load_inputs(resolved)).seconds
        except (PrunebenchError, NotImplementedError):
            return None
        return sum(seconds.values()) if seconds else None

    def path_of(self, trial: Trial) -> Path:
        """Return the file of a row."""
        return ResultStore(self.request.results_dir).find(trial.result_id)

    def run(self, tell: Tell = lambda step, line: None) -> None:
        """Race until a configuration holds the floor on unseen text, none can, or the budget.

        A run that has begun is finished. Where the budget cuts the race, the leader so far is
        still confirmed.
        """
        started = time.monotonic()
        steps = self.race.steps()
        trial: Trial | None = None
        while True:
            step = _next(steps, trial)
            if step is None:
                return
            if not self._fits(step, started):
                break
            trial = self.measure(step, tell)
        self.cut = step
        # what is known is worth its confirmation
        while (leader := self.race.leader()) and not self.race.chosen:
            latest = self.race.latest(leader)
            assert latest is not None
            confirm = Step(leader, latest.step.round, unseen=True)
            if not self._fits(confirm, started):
                return
            self.race.add(self.measure(confirm, tell))

    def expected(self, step: Step) -> float | None:
        """Return the expected seconds of a step, from those measured before."""
        return expected_seconds(step, self.race.trials, self.rounds, unseen=self.unseen)

    def _fits(self, step: Step, started: float) -> bool:
        left = self.request.budget_seconds - (time.monotonic() - started)
        if step.unseen and not any(t.step.unseen for t in self.race.trials):
            return True  # time for the first confirmation was set aside
        if self._row_is_there(step):
            return True  # it costs nothing
        need = self.expected(step) or 0.0
        leader = self.race.leader()
        if leader and not step.unseen:
            latest = self.race.latest(leader)
            assert latest is not None
            need += self.expected(Step(leader, latest.step.round, unseen=True)) or 0.0
        return left > 0 and need <= left

    def _row_is_there(self, step: Step) -> bool:
        try:
            return self._sweep().finished(self.cell(step)) is not None
        except PrunebenchError:
            return False  # the step itself says why

    # ------------------------------------------------------------ one step

    def cell(self, step: Step) -> RecipeCell:
        """Return the run of a step, with the options that are not at their default."""
        ask, candidate = self.request, step.candidate
        given: dict[str, Any] = {"model": ask.model, **candidate.options}
        if candidate.reads:
            given |= {
                "calibration": ask.calibration,
                "calibration_samples": self.rounds[step.round].samples, "seqlen": ask.seqlen,
            }  # fmt: skip
            given |= {"calibration_bos": "window"} if self.bos == "window" else {}
        scored = self.rounds[step.round].scored
        if self.parts is None:
            limit = self.unseen if step.unseen else scored
            given |= {"ppl": [], "tasks": list(self.tasks), "limit": limit}
        else:
            given |= {"ppl": [self.parts.unseen if step.unseen else self.parts.race]}
            given |= {"ppl_seqlen": ask.ppl_seqlen}
            given |= {"ppl_bos": "window"} if self.bos == "window" else {}
            if not step.unseen and scored < self.parts.race_windows:
                given["ppl_tokens"] = scored * ask.ppl_seqlen
        given |= {"seed": ask.seed} if ask.seed else {}
        return RecipeCell(len(self.race.trials) + 1, given, with_defaults(given))

    def command(self, step: Step) -> list[str]:
        """Return the command that makes the row of a step."""
        words = self._sweep().command(self.cell(step))
        return [word for word in words if word != "--json"]

    def measure(self, step: Step, tell: Tell) -> Trial:
        """Run a step, or read its row, and return what it gave."""
        cell = self.cell(step)
        if step.unseen and self.request.save is not None:
            resolved = self._sweep().resolve(cell)
            setup = replace(
                resolved.setup, save_model=self.request.save, force=self.request.force,
                progress=self.progress, command=self.request.command,
            )  # fmt: skip
            outcome = run_and_save(cell, resolved, setup, lambda line: tell(step, line))
        else:
            sweep = self._sweep(lambda cell, line: tell(step, line))
            with contextlib.closing(sweep.run([cell])) as stream:
                outcome = next(stream)
        trial = self._trial(step, outcome)
        if step.unseen and self.request.save is not None:
            held = trial.value is not None and self.race.floor.holds(trial.value)
            if not held and outcome.state == "done":
                # a checkpoint that misses the floor is not what was asked for
                shutil.rmtree(self.request.save, ignore_errors=True)
        if trial.value is None:
            tell(step, f"failed: {trial.reason}")
        else:
            before = "there already, " if trial.was_there else f"{outcome.seconds:.0f} s, "
            tell(step, before + self.request.floor.text(trial.value))
        return trial

    def _sweep(self, tell: Callable[[RecipeCell, str], None] = lambda cell, line: None) -> Sweep:
        return Sweep(self._setup, engine=self.engine, tell=tell, here=True)

    def _trial(self, step: Step, outcome: CellOutcome) -> Trial:
        result = outcome.result
        if result is None:
            return Trial(step, reason=outcome.reason)
        size, cost = size_of(result), result.cost
        # an error here is one of the text or the tasks, and no failure of the candidate
        if self.parts is not None:
            value = perplexity_value(result)
        else:
            seen = self._rows.get(f"{step.candidate.name} {step.round}")
            value = recovery_value(result, self.tasks, seen=seen if step.unseen else None)
        if not step.unseen:
            self._rows[f"{step.candidate.name} {step.round}"] = result
        recovered = result.recovery.seconds if result.recovery else 0.0
        return Trial(
            step, value.value,
            size_bytes=size.total_bytes if size else step.candidate.expected_bytes,
            form=size.form if size else "", score=value.score, dense=value.dense,
            protocol=value.protocol, result_id=result.id,
            total_seconds=cost.total_seconds if cost else 0.0,
            work_seconds=(cost.prune_seconds if cost else 0.0) + (recovered or 0.0),
            was_there=outcome.state == "finished", with_seen=value.with_seen,
        )  # fmt: skip

    def _may_save(self, saved: Result) -> bool:
        """Return whether a saved row is a confirmation of this race that holds its floor."""
        steps = [
            Step(candidate, number, unseen=True)
            for candidate in self.race.candidates
            if candidate.options["method"] == saved.spec.method
            for number in range(len(self.rounds))
        ]
        ids = {self._sweep().resolve(self.cell(step)).spec.spec_id for step in steps}
        if saved.spec_id not in ids:
            return False
        # of a recovery the share on unseen questions follows from the race alone
        return self.parts is None or self.race.floor.holds(perplexity_value(saved).value)


def _next(steps: Generator[Step, Trial, None], trial: Trial | None) -> Step | None:
    try:
        return next(steps) if trial is None else steps.send(trial)
    except StopIteration:
        return None
