"""What a race has shown so far: the Pareto front, and what more time could buy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from prunebench.recommend.candidates import Candidate
from prunebench.recommend.race import Race, Step, Trial


@dataclass(frozen=True)
class Round:
    """What a round measures on.

    Attributes:
        samples: Calibration windows.
        scored: Windows that are scored, or questions of each task.
    """

    samples: int
    scored: int


def pareto_front(race: Race) -> list[Trial]:
    """Return the measurements that no other beats in both size and quality, the smallest first.

    Each candidate counts with its measurement on the most text of the race, so those of several
    rounds stand beside each other; equal ones both stay.
    """
    latest = [t for c in race.candidates if (t := race.latest(c)) and t.value is not None]

    def beaten(trial: Trial) -> bool:
        bad = _badness(race, trial)
        return any(
            other.size_bytes <= trial.size_bytes
            and _badness(race, other) <= bad
            and (other.size_bytes, _badness(race, other)) != (trial.size_bytes, bad)
            for other in latest
        )

    front = [trial for trial in latest if not beaten(trial)]
    return sorted(front, key=lambda t: (t.size_bytes, _badness(race, t)))


def _badness(race: Race, trial: Trial) -> float:
    assert trial.value is not None
    return race.floor.excess(trial.value)


def next_steps(race: Race, rounds: Sequence[Round], upcoming: Step | None) -> list[Step]:
    """Return what would be measured with more time, the nearest to the floor first.

    First what the budget cut off, then what was dropped although it is smaller than the chosen
    one (with more calibration windows), then what was never tried.
    """
    steps = [upcoming] if upcoming else []
    names = {step.candidate.name for step in steps}
    failed = race.failed()
    for candidate in sorted(race.candidates, key=race.excess):
        trial = race.latest(candidate)
        if candidate.name in names or candidate in failed or not _is_smaller(race, candidate):
            continue
        number = 0 if trial is None else trial.step.round + 1
        if number < len(rounds):
            steps.append(Step(candidate, number))
    return steps


def smaller_failed(race: Race) -> list[Candidate]:
    """Return what failed and is smaller than the chosen one: it was not shown to be worse."""
    return [candidate for candidate in race.failed() if _is_smaller(race, candidate)]


def _is_smaller(race: Race, candidate: Candidate) -> bool:
    return race.chosen is None or race.size(candidate) < race.chosen.size_bytes


def expected_seconds(
    step: Step, trials: Sequence[Trial], rounds: Sequence[Round], *, unseen: int
) -> float | None:
    """Estimate a step from what was measured: None where nothing like it was.

    Pruning and recovery grow with the calibration windows, the rest with the scored ones: an upper
    bound, for loading does not grow. A candidate without a measurement of its own takes the median
    of its kind (`Candidate.wave`) in that round.

    Args:
        step: What is to be measured.
        trials: The measurements so far.
        rounds: What the rounds measure on.
        unseen: Windows or questions of the confirmation.
    """
    scored = unseen if step.unseen else rounds[step.round].scored
    own = [t for t in trials if t.step.candidate == step.candidate and t.value is not None]
    if own:
        return _scaled(own[-1], step.candidate, rounds, step.round, scored, unseen)
    alike = [
        _scaled(t, step.candidate, rounds, step.round, scored, unseen)
        for t in trials
        if t.step.candidate.wave == step.candidate.wave and t.value is not None
    ]
    return statistics.median(alike) if alike else None


def _scaled(
    trial: Trial, candidate: Candidate, rounds: Sequence[Round], number: int, scored: int,
    unseen: int,
) -> float:  # fmt: skip
    before = rounds[trial.step.round]
    scored_before = unseen if trial.step.unseen else before.scored
    rest = trial.total_seconds - trial.work_seconds
    work = trial.work_seconds
    if candidate.reads:
        work *= rounds[number].samples / before.samples
    return work + rest * max(1.0, scored / scored_before)
