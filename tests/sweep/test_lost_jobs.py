"""A sweep on an engine that loses jobs: what is tried again, recorded, or refused."""

import pytest

from prunebench.results.store import ResultStore
from prunebench.run.execute import run
from prunebench.spec import Setup
from prunebench.sweep.engines.job import JobEnd, Refused
from prunebench.sweep.sweep import Sweep


class Scripted:
    """An engine that runs a cell in this process, or loses it, as it is told."""

    def __init__(self, *ends, at_once=None):
        self.at_once, self.ends = at_once, list(ends)
        self.jobs, self.cancelled, self.closed, self.most = [], False, False, 0

    def submit(self, job):
        self.jobs.append(job)
        self.most = max(self.most, len(self.jobs))
        return f"job {job.number}"

    def wait(self):
        job = self.jobs.pop(0)
        end = self.ends.pop(0) if self.ends else "ok"
        if isinstance(end, BaseException):
            raise end
        if end != "ok":
            return job, end
        cell = self.cells[job.number - 1]
        result = run(cell.spec, Setup(results_dir=self.results))
        return job, JobEnd(0, result_id=result.id)

    def cancel(self):
        self.cancelled = True

    def close(self):
        self.closed = True


LOST = JobEnd(None, reason="its node is gone")


@pytest.fixture
def sweep_on(recipe, tmp_path):
    def go(engine, cells=None):
        engine.cells, engine.results = recipe.cells, tmp_path / "results"
        messages = []
        sweep = Sweep(
            Setup(results_dir=engine.results), engine=engine,
            tell=lambda cell, line: messages.append(f"{cell.number} {line}"),
        )  # fmt: skip
        outcomes = list(sweep.run(cells or recipe.cells))
        return outcomes, messages, ResultStore(engine.results)

    return go


def test_a_lost_cell_is_tried_once_more(sweep_on):
    engine = Scripted(LOST)
    outcomes, messages, store = sweep_on(engine)
    assert {(outcome.cell.number, outcome.state, outcome.tries) for outcome in outcomes} == {
        (1, "done", 2), (2, "done", 1), (3, "done", 1),
    }  # fmt: skip
    assert "1 failed: its node is gone: retrying once" in messages
    assert [r.status for r in store.read()[0]] == ["ok"] * 3
    assert engine.closed and not engine.cancelled


def test_twice_lost_is_recorded_and_tried_again_by_the_next_sweep(sweep_on, recipe):
    cells = recipe.cells[:1]
    (outcome,), _, store = sweep_on(Scripted(LOST, LOST), cells)
    assert (outcome.state, outcome.tries, outcome.exit_code) == ("failed", 2, 1)
    ((record,), _) = store.read()
    assert (record.status, record.failure.error) == ("failed", "WorkerLost")
    assert "its node is gone" in record.failure.message
    assert record.command.startswith("prunebench run --model")
    (outcome,), _, store = sweep_on(Scripted(), cells)
    assert outcome.state == "done" and len(store.read()[0]) == 2
    (outcome,), _, _ = sweep_on(Scripted(), cells)
    assert outcome.state == "finished"


def test_what_would_fail_the_same_way_is_not_tried_again(sweep_on, recipe):
    (outcome,), _, store = sweep_on(
        Scripted(JobEnd(6, reason="too few zeros", stage="measure")), recipe.cells[:1]
    )
    assert (outcome.tries, outcome.exit_code) == (1, 6)
    ((record,), _) = store.read()
    assert (record.failure.error, record.failure.stage) == ("ProcessFailed", "measure")


def test_a_worker_lost_after_it_filed_loses_nothing(sweep_on, recipe):
    class FiledThenLost(Scripted):
        def wait(self):
            job, _ = super().wait()
            return job, LOST

    (outcome,), _, store = sweep_on(FiledThenLost(), recipe.cells[:1])
    assert outcome.state == "done" and len(store.read()[0]) == 1


def test_a_result_that_does_not_arrive_is_a_failure(sweep_on, recipe, monkeypatch):
    import prunebench.sweep.sweep as module

    monkeypatch.setattr(module, "_ARRIVAL_SECONDS", 0.0)
    monkeypatch.setattr(module, "_ARRIVAL_POLL_SECONDS", 0.01)
    elsewhere = JobEnd(0, result_id="abc-20260101T000000Z-0")
    (outcome,), _, _ = sweep_on(Scripted(elsewhere, elsewhere), recipe.cells[:1])
    assert "is the folder the same on all machines?" in outcome.reason


def test_a_full_engine_is_given_the_rest_later(sweep_on):
    class Closed(Scripted):
        def submit(self, job):
            raise Refused("no such partition")

    with pytest.raises(Refused):
        sweep_on(Closed())

    class Full(Scripted):
        def submit(self, job):
            if len(self.jobs) == 2:
                raise Refused("too many jobs")
            return super().submit(job)

    outcomes, _, _ = sweep_on(Full())
    assert [outcome.state for outcome in outcomes] == ["done"] * 3


def test_so_many_at_a_time(sweep_on):
    engine = Scripted(at_once=2)
    sweep_on(engine)
    assert engine.most == 2


def test_an_interrupt_ends_the_jobs(sweep_on):
    engine = Scripted(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sweep_on(engine)
    assert engine.cancelled and engine.closed
