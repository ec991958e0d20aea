"""What a budget cuts, and what a search counts as failed: runs are stubs, no model is loaded."""

from pathlib import Path

from prunebench.recommend.candidates import AT_ONCE, ONE_SHOT, Candidate
from prunebench.recommend.floor import Floor
from prunebench.recommend.front import Round, next_steps
from prunebench.recommend.race import Race, Trial
from prunebench.recommend.search import Request, Search

ROUNDS = [Round(8, 8), Round(32, 16), Round(96, 32)]


class StubbedSearch(Search):
    """Takes its values from a table: by name, one a round and the last on unseen text."""

    values: dict[str, list[float]]
    there = ("round 1", "round 2", "round 3")

    def measure(self, step, tell):
        value = self.values[step.candidate.name][-1 if step.unseen else step.round]
        size = step.candidate.expected_bytes
        return Trial(step, value, size_bytes=size, total_seconds=10.0, work_seconds=8.0)

    def _row_is_there(self, step):
        return not step.unseen and f"round {step.round + 1}" in self.there


def searched(values, sizes, *, budget):
    request = Request(
        model="m", floor=Floor("ppl", 2.0), goal="bytes", text="t", tasks=(), calibration="c",
        calibration_samples=96, seqlen=32, ppl_seqlen=32, bos=None, seed=0,
        results_dir=Path("none"), device="cpu", budget_seconds=budget,
    )  # fmt: skip
    search = StubbedSearch(request, engine=None)
    search.values, search.rounds, search.unseen = values, ROUNDS, 64
    candidates = [
        Candidate(name, ONE_SHOT if name == "half" else AT_ONCE, {}, size)
        for name, size in sizes.items()
    ]
    search.race = Race(candidates, request.floor, len(ROUNDS))
    search.run()
    return search


def test_a_confirmation_that_was_made_is_not_what_more_time_could_buy():
    # all rows of the race are there, and no time is left when its confirmation comes
    search = searched({"int4": [1.3, 1.3, 1.3, 1.35]}, {"int4": 4}, budget=1e-9)
    assert search.race.chosen.value == 1.35
    # the race is at its end as with any budget
    assert search.cut is None and next_steps(search.race, ROUNDS, search.cut) == []


def test_the_budget_cuts_behind_a_first_confirmation_that_misses_the_floor():
    values = {"int4": [1.9, 1.9, 1.9, 2.2], "int8": [1.0] * 4}
    search = searched(values, {"int4": 4, "int8": 8}, budget=1e-9)
    assert search.race.chosen is None
    assert [t.step.candidate.name for t in search.race.trials if t.step.unseen] == ["int4"]
    # int8 was measured in rounds whose rows are there; its confirmation is what is left to buy
    assert (search.cut.candidate.name, search.cut.unseen) == ("int8", True)
    assert next_steps(search.race, ROUNDS, search.cut)[0] == search.cut
