"""What stands beside what in a result, and which scores are used again."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from torch import nn

from prunebench.errors import CheckFailed
from prunebench.evaluate.outcome import Measure, Outcome
from prunebench.models.journal import RunJournal
from prunebench.progress import Silent, StageTimer
from prunebench.run.scoring import build_score_blocks, score_pruned


def outcome(value, **other):
    measures = {"acc": Measure(value, None, higher_is_better=True)}
    given = {"protocol": "lm-eval/quiz/0-shot/v1.0", "sha256": "a" * 64, **other}
    return Outcome(
        dataset="quiz", origin="hub:quiz", targets=8, limited=False, measures=measures, **given
    )


def test_a_score_stands_beside_the_dense_one_of_the_same_questions():
    (score,) = build_score_blocks([outcome(0.25)], [outcome(0.5)])
    assert (score.value, score.dense_value) == (0.25, 0.5)


@pytest.mark.parametrize("other", [{"sha256": "b" * 64}, {"protocol": "lm-eval/quiz/5-shot/v1.0"}])
def test_scores_of_other_questions_are_not_put_side_by_side(other):
    with pytest.raises(CheckFailed, match="were not asked the same on quiz"):
        build_score_blocks([outcome(0.25)], [replace(outcome(0.5), **other)])


@dataclass
class Quiz:
    """An evaluator that counts how often it is asked."""

    key: str
    name: str = "quiz"
    unit: str = "documents"
    units: int = 8
    asked: list[int] = field(default_factory=list)

    def score(self, model, *, advance):
        self.asked.append(1)
        return [outcome(0.5, sha256=self.key * 64)]


def test_a_resumed_run_uses_scores_of_the_same_evaluation_only(tmp_path):
    journal = RunJournal(tmp_path / "kept")
    assert journal.lock()
    model = nn.Linear(1, 1)

    def scores(quiz):
        journal.read()
        plan = SimpleNamespace(texts=[], tasks=[quiz], progress=StageTimer(Silent()))
        return score_pruned(plan, model, None, journal)

    first, again, other = Quiz("a"), Quiz("a"), Quiz("b")  # b: the records have changed
    assert scores(first) == scores(again) and (first.asked, again.asked) == ([1], [])
    assert scores(other)[0].sha256 == "b" * 64 and other.asked == [1]
    journal.release()
