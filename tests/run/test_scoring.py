"""What stands beside what in a result, and which scores are used again."""

from dataclasses import replace

import pytest

from prunebench.errors import CheckFailed
from prunebench.evaluate.outcome import Measure, Outcome
from prunebench.run.scoring import build_score_blocks


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
