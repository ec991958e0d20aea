"""Evaluate the dense model, the pruned one, and the prior of a training; pair the scores.

Outcomes of the same model in the same evaluation are cached.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from prunebench.errors import CheckFailed
from prunebench.evaluate.divergence import Divergence
from prunebench.evaluate.outcome import (
    Evaluator,
    Outcome,
    ScoredModel,
    cached_outcomes,
    outcomes_from,
    remember_outcomes,
)
from prunebench.files import cache_dir
from prunebench.models.hashing import hash_weights
from prunebench.models.journal import RunJournal
from prunebench.results.samples import Sample
from prunebench.results.schema import Score
from prunebench.run.plan import Plan


def _evaluators(plan: Plan) -> list[Evaluator]:
    return [*plan.texts, *plan.tasks]


def score_dense(plan: Plan, model: nn.Module, dense_sha256: str) -> list[Outcome]:
    """Score the dense model; cached outcomes are reused."""
    outcomes, dense = [], ScoredModel.of(model, dense_sha256)
    for evaluator in _evaluators(plan):
        baseline = functools.partial(_score, plan, model, evaluator, stage="baseline")
        outcomes += _scored_once(dense, evaluator, baseline)
    return outcomes


def _scored_once(
    model: ScoredModel, evaluator: Evaluator, score: Callable[[], list[Outcome]]
) -> list[Outcome]:
    """Return the cached outcomes of the model as it is now, or score and cache them."""
    # keyed by model and evaluation: the dense model is scored once for a whole sweep
    outcomes = cached_outcomes(model, evaluator)
    if outcomes is None:
        outcomes = score()
        remember_outcomes(model, evaluator, outcomes)
    return outcomes


def score_pruned(
    plan: Plan, model: nn.Module, dense_sha256: str | None, journal: RunJournal | None
) -> list[Outcome]:
    """Score the model as it is now; outcomes of a dense model are cached."""
    outcomes = []
    # a resumed run has scored some evaluators already; tasks can take longer than the pruning
    dense = ScoredModel.of(model, dense_sha256) if dense_sha256 is not None else None
    scored: dict[str, Any] = dict(journal.state.scored) if journal else {}
    for evaluator in _evaluators(plan):
        key = hashlib.sha256(evaluator.key.encode()).hexdigest()
        earlier = scored.get(evaluator.name, {})
        # of the same name, but asked of other records since, it is scored again
        if earlier.get("key") == key:
            outcomes += outcomes_from(earlier["outcomes"])
            continue
        found = _score(plan, model, evaluator, stage="score")
        if journal:
            scored[evaluator.name] = {"key": key, "outcomes": [asdict(one) for one in found]}
            journal.update(scored=scored)
        if dense is not None:
            remember_outcomes(dense, evaluator, found)
        outcomes += found
    return outcomes


def _score(plan: Plan, model: nn.Module, evaluator: Evaluator, *, stage: str) -> list[Outcome]:
    name, total = evaluator.name, evaluator.units
    with plan.progress.stage(stage, total=total, detail=name, unit=evaluator.unit) as advance:
        return evaluator.score(model, advance=advance)


def collect_dense_logits(plan: Plan, model: nn.Module) -> list[Divergence]:
    """Return the dense model's hidden states, the reference for the divergence scores."""
    if not plan.spec.divergence:
        return []
    references = []
    for text in plan.texts:
        with plan.progress.stage(
            "baseline", total=text.units, detail=f"distributions on {text.name}", unit="windows"
        ) as advance:
            references.append(Divergence.of_dense(model, text, advance=advance))
    return references


def score_divergence(plan: Plan, model: nn.Module, references: list[Divergence]) -> list[Outcome]:
    """Compare the model's next-token distributions with the dense model's."""
    outcomes = []
    for reference in references:
        text = reference.text
        with plan.progress.stage(
            "score", total=text.units, detail=f"distributions on {text.name}", unit="windows"
        ) as advance:
            outcomes.append(reference.score(model, advance=advance))
    return outcomes


def score_prior(plan: Plan, model: nn.Module) -> list[Outcome]:
    """Score the initial mask of a training on the texts; cached by its weights."""
    if not plan.texts:
        return []
    outcomes: list[Outcome] = []
    # the prior's masked weights, not the dense ones
    prior = ScoredModel.of(model, hash_weights(model))
    for text in plan.texts:
        silently = functools.partial(text.score, model, advance=lambda done: None)
        scores = _scored_once(prior, text, silently)
        for score in scores:
            value = score.measures["token_ppl"].value
            plan.progress.note(f"  the prior: ppl {value:,.4g} on {score.protocol}")
        outcomes += scores
    return outcomes


def build_score_blocks(pruned: list[Outcome], dense: list[Outcome]) -> list[Score]:
    """Describe the scores of the pruned model, each with the dense model's of its protocol.

    Raises:
        CheckFailed: The two models were not asked the same.
    """
    # both lists come from the same evaluators in the same order
    pairs = list(zip(pruned, dense, strict=True))
    for outcome, reference in pairs:
        _require_same_questions(outcome, reference)
    return [
        Score(
            metric=metric,
            dataset=outcome.dataset,
            origin=outcome.origin,
            protocol=outcome.protocol,
            value=measure.value,
            dense_value=reference.measures[metric].value,
            higher_is_better=measure.higher_is_better,
            targets=outcome.targets,
            limited=outcome.limited,
            tokens_sha256=outcome.sha256,
            stderr=measure.stderr,
            dense_stderr=reference.measures[metric].stderr,
            member_of=outcome.member_of,
        )
        for outcome, reference in pairs
        for metric, measure in outcome.measures.items()
    ]


def _require_same_questions(outcome: Outcome, reference: Outcome) -> None:
    """Refuse to put a score beside one of other tokens or documents."""
    asked = (outcome.protocol, outcome.sha256)
    if asked != (reference.protocol, reference.sha256):
        raise CheckFailed(
            f"the pruned and the dense model were not asked the same on {outcome.dataset}",
            where=f"{' '.join(asked)}, and the dense one {reference.protocol} {reference.sha256}",
            fix=f"remove {cache_dir() / 'baselines'}, and run again",
        )


def samples_of(outcomes: list[Outcome], dense: list[Outcome]) -> list[Sample]:
    """Return the values of every document and window, of the pruned and the dense model."""
    return [
        Sample(
            protocol=outcome.protocol,
            item=number,
            sha256=item.sha256,
            values=item.values,
            dense_values=other.values,
        )
        for outcome, beside in zip(outcomes, dense, strict=True)
        for number, (item, other) in enumerate(zip(outcome.items, beside.items, strict=True))
    ]
