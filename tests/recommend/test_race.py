"""The schedule of a race, its front, and the words of a floor, without a model."""

import json
from pathlib import Path

import pytest

from prunebench.errors import UsageError
from prunebench.recommend.candidates import (
    AT_ONCE,
    ONE_SHOT,
    RECOVERY,
    Candidate,
    ModelCounts,
    candidates_for,
    expected_bytes,
)
from prunebench.recommend.floor import Floor, parse_budget, parse_goal
from prunebench.recommend.front import Round, expected_seconds, next_steps, pareto_front
from prunebench.recommend.race import Race, Step, Trial
from prunebench.results.schema import Result
from prunebench.results.sizes import size_of

ROUNDS = [Round(8, 8), Round(32, 16), Round(96, 32)]
RESULTS = Path(__file__).parents[2] / "results"


def candidate(name, size, wave=ONE_SHOT):
    return Candidate(name, wave, {"method": name}, size)


def trial(step, value, *, seconds=10.0, work=8.0):
    return Trial(
        step, value, size_bytes=step.candidate.expected_bytes, score=value, dense=1.0,
        total_seconds=seconds, work_seconds=work,
    )  # fmt: skip


def race_of(candidates, values, limit=2.0, stop_after=None):
    """Run a race on `values`: by name, one a round and the last on unseen text."""
    race = Race(candidates, Floor("ppl", limit), len(ROUNDS))
    steps, log = race.steps(), []
    step = next(steps)
    while True:
        log.append((step.candidate.name, "unseen" if step.unseen else step.round + 1))
        value = values[step.candidate.name][-1 if step.unseen else step.round]
        sent = Trial(step, reason="broken") if value is None else trial(step, value)
        try:
            step = steps.send(sent)
        except StopIteration:
            return race, log
        if stop_after == len(log):
            return race, log


def test_the_smallest_that_holds_the_floor_is_confirmed_and_larger_ones_are_not_run():
    race, log = race_of(
        [candidate("int3", 3, AT_ONCE), candidate("int4", 4, AT_ONCE), candidate("int8", 8, 0),
         candidate("half", 9), candidate("recovered", 4, RECOVERY)],
        {"int3": [3.4], "int4": [1.3, 1.3, 1.3, 1.35]},
    )  # fmt: skip
    assert log == [("int3", 1), ("int4", 1), ("int4", 2), ("int4", "unseen")]
    assert race.chosen.step.candidate.name == "int4" and race.chosen.value == 1.35
    assert race.drops == {"int3": "round 1: more than 1.5 times the floor"}


def test_a_smaller_one_that_misses_by_little_is_measured_on_more_and_may_win():
    values = {"int4": [1.3] * 4, "int3": [2.5, 2.1, 1.9, 1.95]}
    race, log = race_of([candidate("int3", 3), candidate("int4", 4)], values)
    assert log == [("int3", 1), ("int4", 1), ("int3", 2), ("int4", 2), ("int3", 3),
                   ("int3", "unseen")]  # fmt: skip
    assert race.chosen.step.candidate.name == "int3"


def test_a_recovery_is_not_measured_on_more_once_its_like_holds_the_floor_without():
    values = {"alps": [2.5, 1.7, 1.6, 1.8], "long": [1.9, 1.5, 1.4, 1.5]}
    both = [candidate("alps", 5), candidate("long", 5, RECOVERY)]
    race, log = race_of(both, values)
    assert log == [("alps", 1), ("long", 1), ("alps", 2), ("alps", "unseen")]
    assert race.chosen.step.candidate.name == "alps"
    # nor is it lost: where the new leader falls, it is measured on more, and confirmed
    race, log = race_of(both, values | {"alps": [2.5, 1.7, 1.6, 2.1]})
    assert log[3:] == [("alps", "unseen"), ("long", 2), ("long", "unseen")]
    assert race.chosen.step.candidate.name == "long"


def test_a_winner_that_misses_the_floor_on_unseen_text_gives_way_to_a_larger_one():
    values = {"int4": [1.9, 1.9, 1.9, 2.2], "int8": [1.0] * 4}
    race, log = race_of([candidate("int4", 4), candidate("int8", 8)], values)
    assert log == [("int4", 1), ("int4", 2), ("int4", "unseen"), ("int8", 1), ("int8", 2),
                   ("int8", "unseen")]  # fmt: skip
    assert race.chosen.step.candidate.name == "int8"
    assert race.drops == {"int4": "on unseen text 2.200x, above the floor"}


def test_a_leader_that_falls_on_more_text_gives_way_too():
    values = {"int4": [1.9, 2.1, 2.1, 9.0], "int8": [1.0] * 4}
    race, log = race_of([candidate("int4", 4), candidate("int8", 8)], values)
    # int4 misses by little and is smaller: it gets the last round beside the new leader
    assert log[:3] == [("int4", 1), ("int4", 2), ("int8", 1)]
    assert log[-1] == ("int8", "unseen") and race.chosen.step.candidate.name == "int8"


def test_while_nothing_holds_the_floor_the_better_half_goes_on():
    values = {name: [value, value - 0.1, value - 0.2] for name, value in
              {"a": 9.0, "b": 4.0, "c": 3.0, "d": 5.0}.items()}  # fmt: skip
    race, log = race_of([candidate(name, 5) for name in "abcd"], values)
    assert log == [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("b", 2), ("c", 2), ("c", 3)]
    assert race.chosen is None and race.leader() is None
    assert race.nearest().step.candidate.name == "c" and race.nearest().value == 2.8
    assert race.drops["d"] == "round 1: not among the nearest 2 of 4"


def test_equal_sizes_are_compared_but_not_with_a_recovery_that_is_not_needed():
    values = {"rtn": [1.4] * 4, "gptq": [1.2] * 4}
    race, log = race_of(
        [candidate("rtn", 4, AT_ONCE), candidate("gptq", 4), candidate("long", 4, RECOVERY)],
        values,
    )
    assert log == [("rtn", 1), ("gptq", 1), ("gptq", 2), ("gptq", "unseen")]
    assert race.chosen.step.candidate.name == "gptq"


def test_a_failed_run_is_out_and_the_race_goes_on():
    race, log = race_of(
        [candidate("bad", 1), candidate("good", 4)], {"bad": [None], "good": [1.5] * 4}
    )
    assert log == [("bad", 1), ("good", 1), ("good", 2), ("good", "unseen")]
    assert race.drops == {"bad": "failed: broken"}


def test_the_order_depends_on_the_values_alone():
    candidates = candidates_for("bytes", ModelCounts(1_200, 1_000, frozenset({128})))
    values = {c.name: [1.1 + 0.37 * i % 3, 1.6, 1.7, 1.8] for i, c in enumerate(candidates)}
    whole = race_of(candidates, values)[1]
    assert whole == race_of(candidates, values)[1]
    # cut off by a budget, it is the beginning of the same race
    assert race_of(candidates, values, stop_after=4)[1] == whole[:4]


def test_the_front_has_what_no_other_beats():
    race, _ = race_of(
        [candidate("a", 3), candidate("b", 4), candidate("c", 5), candidate("d", 5)],
        {"a": [4.0] * 3, "b": [6.0] * 3, "c": [3.0] * 3, "d": [3.0] * 3},
    )
    names = [t.step.candidate.name for t in pareto_front(race)]
    assert names == ["a", "c", "d"]  # b is larger and worse than a; equal ones both stay


def test_what_more_time_could_buy_and_for_how_long():
    values = {"int4": [1.3] * 4, "a": [2.9, 2.9], "b": [2.8, 2.7, 2.7], "c": [3.5]}
    candidates = [candidate("a", 3), candidate("b", 3), candidate("c", 3), candidate("int4", 4)]
    race, _ = race_of(candidates, values)
    steps = next_steps(race, ROUNDS, None)
    assert [(s.candidate.name, s.round + 1) for s in steps] == [("b", 3), ("a", 2), ("c", 2)]
    assert all(race.size(s.candidate) < race.chosen.size_bytes for s in steps)
    step = Step(candidates[0], 0)
    own = [trial(step, 2.9, seconds=10.0, work=8.0)]
    # four times the calibration, twice the text
    assert expected_seconds(Step(candidates[0], 1), own, ROUNDS, unseen=27) == 8 * 4 + 2 * 2
    assert expected_seconds(Step(candidates[1], 0), own, ROUNDS, unseen=27) == 10
    assert expected_seconds(Step(candidate("x", 1, AT_ONCE), 0), own, ROUNDS, unseen=27) is None


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [("ppl=1.25x", "ppl", 1.25), ("ppl=2", "ppl", 2.0), ("recovery=95%", "recovery", 0.95),
     ("recovery=0.95", "recovery", 0.95)],
)  # fmt: skip
def test_floors(text, kind, limit):
    floor = Floor.parse(text)
    assert (floor.kind, floor.limit) == (kind, pytest.approx(limit))
    assert floor.holds(floor.limit) and floor.excess(floor.limit) == pytest.approx(1)
    assert not floor.holds(limit * (1.01 if kind == "ppl" else 0.99))


@pytest.mark.parametrize(
    "text", ["", "ppl", "ppl=", "ppl=0.9x", "ppl=-2x", "ppl=95%", "acc=95%", "recovery=120%",
             "recovery=0%", "recovery=2x", "ppl=1,5x", "ppl=nan"],
)  # fmt: skip
def test_bad_floors(text):
    with pytest.raises(UsageError, match="--floor"):
        Floor.parse(text)


def test_budgets_and_goals():
    assert [parse_budget(t) for t in ("90s", "30m", "1.5h")] == [90, 1800, 5400]
    for text in ("30", "0m", "m", "30 min", "-3m"):
        with pytest.raises(UsageError, match="--budget"):
            parse_budget(text)
    assert parse_goal("2:4") == "2:4"
    with pytest.raises(UsageError, match="did you mean 'bytes'"):
        parse_goal("byte")


@pytest.mark.parametrize("goal", ["bytes", "speed", "2:4"])
def test_cheap_waves_come_first_and_names_are_unique(goal):
    candidates = candidates_for(goal, ModelCounts(1_200, 1_000, frozenset({96, 64})))
    assert [c.wave for c in candidates] == sorted(c.wave for c in candidates)
    assert len({c.name for c in candidates}) == len(candidates)
    for wave in (AT_ONCE, ONE_SHOT, RECOVERY):
        sizes = [c.expected_bytes for c in candidates if c.wave == wave]
        assert sizes == sorted(sizes)
    if goal == "2:4":
        assert all(c.options["sparsity"] == "2:4" for c in candidates)


def test_recovery_uses_the_loss_that_suits_every_model_and_keeps_the_other_options():
    candidates = candidates_for("bytes", ModelCounts(1_200, 1_000, frozenset({128})))
    recovered = {c.name: c.options["set"] for c in candidates if c.wave == RECOVERY}
    assert recovered["sparsegpt 2:4, then block"] == {"recover.loss": "channels"}
    assert recovered["sparsegpt 2:4 + INT4, then block"] == {
        "quantize_bits": 4, "group_size": 128, "recover.loss": "channels",
    }  # fmt: skip
    assert not any("recover" in c.options for c in candidates if c.wave != RECOVERY)


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("gptq-0", {"sparsity": "0", "bits": None}),
        ("sparsegpt-2of4", {"sparsity": "2:4", "bits": None}),
        ("sparsegpt-0.5", {"sparsity": "0.5"}),
        ("depth-0.2", {"sparsity": "0.2", "blocks": True}),
    ],
)
def test_expected_bytes_are_those_of_the_committed_rows(folder, options):
    for path in sorted((RESULTS / "smollm2-135m-q4" / folder).glob("*.json")):
        result = Result.model_validate(json.loads(path.read_text()))
        if result.status != "ok":
            continue
        model, bits = result.model, result.quantization and result.quantization.bits
        counts = ModelCounts(model.parameters, model.prunable_parameters, frozenset({576, 1536}))
        assert counts.group_size == 64
        options = {**options} | ({} if "blocks" in options else {"bits": bits})
        expected = expected_bytes(counts, **options)
        # zeros of a matrix with a rounded ratio, norms of removed blocks
        assert expected == pytest.approx(size_of(result).total_bytes, rel=2e-4)
