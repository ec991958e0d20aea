"""The race: which configuration is measured next, on how much, and which are dropped.

    steps = race.steps()
    step = next(steps)
    while True: step = steps.send(measure(step))     # until StopIteration

Successive halving under a floor. In round 1 all candidates are measured on little: methods that
read no data first, then calibrated ones, then those with recovery, the smallest first in each. A
candidate that cannot become smaller than one that holds the floor is not measured at all. Into
the next round go the leader (the smallest that holds the floor) and the candidates that are
smaller and miss it by little; while nothing holds the floor, the better half goes. Who comes to
hold the floor takes the lead in the midst of a round, and what is larger is not measured on more.
What is left at the end is measured once on text that no round has seen.

The order depends on the values alone, never on the time that anything took. There is no state to
save: whoever starts again sends the same values, and gets the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from prunebench.recommend.candidates import RECOVERY, Candidate
from prunebench.recommend.floor import Floor

HOPE = (1.5, 1.2)
"""How many times the floor a smaller candidate may have after a round, to be measured on more.

In committed rows four times the calibration windows lowered a perplexity by less than that.
"""


@dataclass(frozen=True)
class Step:
    """A measurement to make.

    Attributes:
        round: Index of the round; its calibration windows are used on unseen text too.
        unseen: Whether it is the confirmation, on text that no round has seen.
    """

    candidate: Candidate
    round: int
    unseen: bool = False


@dataclass(frozen=True)
class Trial:
    """What a step gave.

    Attributes:
        value: In the unit of the floor; None where the run failed.
        size_bytes: Of the checkpoint, computed from the row.
        form: How it is stored.
        score: What was measured, and `dense` beside it.
        protocol: Of the score.
        result_id: The row.
        reason: Why it failed.
        total_seconds, work_seconds: Of the run, and of pruning and recovery alone.
        was_there: Whether the row was there before.
        with_seen: Whether questions of the race are among those of a confirmation.
    """

    step: Step
    value: float | None = None
    size_bytes: int = 0
    form: str = ""
    score: float = math.nan
    dense: float = math.nan
    protocol: str = ""
    result_id: str = ""
    reason: str = ""
    total_seconds: float = 0.0
    work_seconds: float = 0.0
    was_there: bool = False
    with_seen: bool = False


@dataclass
class Race:
    """A race and its state.

    Attributes:
        candidates: In the order in which round 1 takes them.
        rounds: How many rounds there are before the confirmation.
        trials: All measurements so far, in order.
        drops: Why a candidate is out for good, by name.
        chosen: The configuration that holds the floor on unseen text, once there is one.
    """

    candidates: Sequence[Candidate]
    floor: Floor
    rounds: int
    trials: list[Trial] = field(default_factory=list)
    drops: dict[str, str] = field(default_factory=dict)
    chosen: Trial | None = None

    def steps(self) -> Generator[Step, Trial, None]:
        """Yield what is to be measured; expects each `Trial` to be sent back."""
        while not self.chosen:
            for candidate in self.candidates:
                if self._is_needed(candidate):
                    yield from self._measure(Step(candidate, 0))
            for number in range(1, self.rounds):
                for candidate in self._promoted(number):
                    if not self.larger(candidate):  # than the leader, which may have changed
                        yield from self._measure(Step(candidate, number))
                if any(map(self._is_needed, self.candidates)):
                    break  # the leader fell, for whose sake they were passed over
            else:
                leader = self.leader()
                if leader is None:
                    return
                if self._round_of(leader) < min(1, self.rounds - 1):
                    # seen on the least text only: on more of it before the unseen part
                    yield from self._measure(Step(leader, self._round_of(leader) + 1))
                else:
                    yield from self._measure(Step(leader, self._round_of(leader), unseen=True))

    def _measure(self, step: Step) -> Generator[Step, Trial, None]:
        self.add((yield step))

    def add(self, trial: Trial) -> None:
        """Take in a measurement: a failed run is out, and so is what misses the floor unseen."""
        self.trials.append(trial)
        name = trial.step.candidate.name
        if trial.value is None:
            self.drops[name] = f"failed: {trial.reason}"
        elif not trial.step.unseen:
            return
        elif self.floor.holds(trial.value):
            self.chosen = trial
        else:
            self.drops[name] = f"on unseen text {self.floor.text(trial.value)}, above the floor"
            if self.floor.kind == "recovery":
                part = "all" if trial.with_seen else "unseen"
                self.drops[name] = f"on {part} questions {self.floor.text(trial.value)}, below it"

    # ------------------------------------------------------------ who stands where

    def latest(self, candidate: Candidate) -> Trial | None:
        """Return the measurement on the most text that rounds have seen, failed ones too."""
        own = [t for t in self.trials if t.step.candidate.name == candidate.name]
        return next((t for t in reversed(own) if not t.step.unseen), None)

    def failed(self) -> list[Candidate]:
        """Return the candidates of which a run has failed: nothing is known of them."""
        names = {t.step.candidate.name for t in self.trials if t.value is None}
        return [c for c in self.candidates if c.name in names]

    def leader(self) -> Candidate | None:
        """Return the smallest candidate that holds the floor, as far as it was measured."""
        holders = [c for c in self.candidates if c.name not in self.drops and self.holds(c)]
        return min(holders, key=self._rank, default=None)

    def holds(self, candidate: Candidate) -> bool:
        """Return whether a candidate's latest measurement in a round holds the floor."""
        trial = self.latest(candidate)
        return bool(trial and trial.value is not None and self.floor.holds(trial.value))

    def larger(self, candidate: Candidate) -> bool:
        """Return whether a candidate cannot be smaller than one that holds the floor.

        One of equal size is measured too, for it may be better; not with a recovery, if one
        without it holds the floor.
        """
        leader = self.leader()
        if leader is None or leader.name == candidate.name:
            return False
        size, least = self.size(candidate), self.size(leader)
        longer = candidate.wave == RECOVERY and leader.wave < RECOVERY
        return size > least or (size == least and longer)

    def _is_needed(self, candidate: Candidate) -> bool:
        return self.latest(candidate) is None and not self.larger(candidate)

    def size(self, candidate: Candidate) -> int:
        """Return the bytes of its row, or those expected where there is none."""
        trial = self.latest(candidate)
        return (trial.size_bytes if trial else 0) or candidate.expected_bytes

    def excess(self, candidate: Candidate) -> float:
        """Return how many times the floor its latest measurement is."""
        trial = self.latest(candidate)
        return math.inf if trial is None or trial.value is None else self.floor.excess(trial.value)

    def _round_of(self, candidate: Candidate) -> int:
        trial = self.latest(candidate)
        return trial.step.round if trial else -1

    def _rank(self, candidate: Candidate) -> tuple[float, bool, float, int]:
        return (
            self.size(candidate), candidate.wave == RECOVERY, self.excess(candidate),
            self.candidates.index(candidate),
        )  # fmt: skip

    def nearest(self) -> Trial | None:
        """Return the measurement that misses the floor by the least; on unseen text, if any."""
        last = {}
        for trial in self.trials:
            if trial.value is not None:
                last[trial.step.candidate.name] = trial
        values = [(self.floor.excess(t.value), t) for t in last.values() if t.value is not None]
        return min(values, key=lambda pair: pair[0])[1] if values else None

    # ------------------------------------------------------------ who goes on

    def _promoted(self, number: int) -> list[Candidate]:
        """Return who is measured in a round, and drop for good who could have been and is not."""
        pool = [
            c for c in self.candidates
            if self._round_of(c) == number - 1 and c.name not in self.drops
        ]  # fmt: skip
        leader = self.leader()
        in_round = sum(t.step.round == number - 1 and not t.step.unseen for t in self.trials)
        places = math.ceil(in_round / 2)
        smaller = pool
        if leader:
            smaller = [c for c in pool if c is not leader and not self.larger(c)]
            smaller = [c for c in smaller if not self.holds(c)]
            hope = HOPE[min(number, len(HOPE)) - 1]
            for candidate in [c for c in smaller if self.excess(c) > hope]:
                smaller.remove(candidate)
                self._drop(candidate, number, f"more than {hope:g} times the floor")
            places = max(1, places - 1)  # the leader has one
        smaller = sorted(smaller, key=self.excess)
        for candidate in smaller[places:]:
            self._drop(candidate, number, f"not among the nearest {places} of {in_round}")
        chosen = smaller[:places]
        # with nobody to beat, more text about the leader decides nothing: its confirmation does
        if leader and leader in pool and (chosen or number == 1):
            chosen.append(leader)
        return [c for c in self.candidates if c in chosen]

    def _drop(self, candidate: Candidate, number: int, why: str) -> None:
        self.drops[candidate.name] = f"round {number}: {why}"
