"""Which rows of the short table are compared, by which score, and when none is the best."""

import pytest

from prunebench.results.finding import finding
from tests.factories import blocks_of, make_result, rows_of, with_tasks


def of_revision(revision, *results):
    return [
        r.model_copy(update={"spec": r.spec.model_copy(update={"model_revision": revision})})
        for r in results
    ]


def test_other_weights_under_one_name_are_no_rivals():
    old = of_revision("aaa", make_result(), make_result(method="b", value=50.0))
    old += of_revision("aaa", make_result(method="c", value=55.0))
    new = of_revision("bbb", make_result(value=30.0), make_result(method="b", value=31.0))
    (block,) = blocks_of([*old, *new])
    assert [row[0] for row in rows_of(block)["0.5"]] == [
        "*wanda revision=bbb", "b revision=bbb", "*wanda", "b", "c",
    ]  # fmt: skip
    assert finding(block).startswith("At 0.5 wanda is best with 2.00 times")
    assert "1.5" not in finding(block)


def test_means_over_tasks_are_compared_with_those_of_the_same_weights():
    old = of_revision("aaa", with_tasks("a", piqa=0.6, rte=0.6), with_tasks("b", piqa=0.5, rte=0.5))
    new = of_revision("", with_tasks("a", piqa=0.8, rte=0.8), with_tasks("b", piqa=0.4, rte=0.4))
    (block,) = blocks_of([*old, *new])
    assert [line.mark for line in block.sections[0].lines] == ["*", "*", " ", " "]


@pytest.mark.parametrize("second", [float("nan"), float("inf")])
def test_of_broken_models_none_is_the_best_nor_named(second):
    broken = [make_result(value=float("nan")), make_result(method="b", value=second)]
    (block,) = blocks_of(broken)
    assert not any(row[0].startswith("*") for row in rows_of(block)["0.5"])
    (block,) = blocks_of([*broken, make_result(method="c"), make_result(method="d", value=50.0)])
    assert finding(block) == "At 0.5 c is best with 2.00 times the perplexity of dense (d 2.50)."


def test_of_broken_means_over_tasks_none_is_the_best():
    nan = float("nan")
    (block,) = blocks_of([with_tasks("a", piqa=nan, rte=0.6), with_tasks("b", piqa=0.5, rte=0.5)])
    assert {row[0] for row in rows_of(block)["0.5"]} == {"*b", "a"}


def test_rows_are_ranked_by_the_mean_that_most_of_them_have():
    few, many = "0-shot/v1.0/first-100", "0-shot/v1.0/first-50"
    rows = [with_tasks(m, asked=few, piqa=v, rte=v, boolq=v) for m, v in (("a", 0.7), ("b", 0.6))]
    rows += [with_tasks(m, asked=many, piqa=v, rte=v) for m, v in (("a", 0.4), ("b", 0.5))]
    (block,) = blocks_of([*rows, with_tasks("c", asked=many, piqa=0.6, rte=0.6)])
    assert block.ranking.key == "acc 0-shot/first-50"
    assert [row[0] for row in rows_of(block)["0.5"]] == ["*c", "b", "a"]


@pytest.mark.parametrize(
    ("limits", "first"),
    [
        ({"/first-100": ("piqa", "rte"), "/first-50": ("piqa", "rte", "boolq")}, "/first-50"),
        ({"/first-100": ("piqa", "rte"), "/first-500": ("piqa", "rte")}, "/first-500"),
        ({"/first-900": ("piqa", "rte"), "/first-1000": ("piqa", "rte")}, "/first-1000"),
        ({"/first-900": ("piqa", "rte"), "": ("piqa", "rte")}, ""),
    ],
)
def test_of_means_that_as_many_rows_have_the_most_tasks_then_documents_count(limits, first):
    rows = [
        with_tasks(method, asked=f"0-shot/v1.0{limit}", **dict.fromkeys(tasks, 0.6))
        for method in ("a", "b")
        for limit, tasks in limits.items()
    ]
    (block,) = blocks_of(rows)
    assert block.ranking.key == f"acc 0-shot{first}"
