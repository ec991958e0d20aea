"""A group of tasks counts once: its own score does, and those of its members are not added."""

from prunebench.results.columns import NAMED_RANK, task_means
from prunebench.results.compare import compare
from prunebench.results.overview import overview
from tests.factories import make_result, with_tasks


def with_group(method, value, **tasks):
    """A result with a group of tasks as lm-eval gives it: its members, then its own mean."""
    result = with_tasks(method, **tasks, mmlu=value)
    scores = [
        score.model_copy(update={"member_of": "mmlu" * (score.dataset in tasks)})
        for score in result.scores
    ]
    return result.model_copy(update={"scores": scores})


def test_a_mean_has_the_score_of_a_group_and_not_its_members_too():
    result = with_group("a", 0.3, abstract_algebra=0.2, mmlu_stem=0.4)
    assert task_means(compare([result])[0].cells) == []
    piqa = with_tasks("a", piqa=0.6).scores
    both = result.model_copy(update={"scores": [*result.scores, *piqa, *make_result().scores]})
    tables = compare([both])
    (mean,) = task_means(tables[0].cells)
    assert (mean.title, mean.tasks) == ("acc(2)", ["mmlu", "piqa"])
    short = overview(tables)
    ranks = {column.key: column.rank for column in short.blocks[0].columns}
    assert ranks["acc/abstract_algebra"] == ranks["acc/piqa"] == NAMED_RANK
    assert not any("abstract_algebra" in text for text in short.legend)


def test_rows_with_a_group_alone_are_ranked_by_it_and_not_by_a_member():
    rows = [with_group(m, v, abstract_algebra=0.2) for m, v in (("a", 0.3), ("b", 0.4))]
    (block,) = overview(compare(rows)).blocks
    assert block.caption[0].startswith("acc on mmlu")
    (section,) = block.sections
    assert [(line.mark, line.words) for line in section.lines] == [("*", ("b",)), (" ", ("a",))]


def test_members_of_a_group_without_that_metric_speak_for_themselves():
    result = with_tasks("a", rte=0.6, boolq=0.5)
    scores = [score.model_copy(update={"member_of": "group"}) for score in result.scores]
    (mean,) = task_means(compare([result.model_copy(update={"scores": scores})])[0].cells)
    assert mean.tasks == ["boolq", "rte"]
