"""The table of accuracies and divergences: ranked by their own noise, beside dense."""

import pytest

from prunebench.results import render
from prunebench.results.cell_score import within_noise
from prunebench.results.compare import compare
from prunebench.results.overview import overview
from tests.factories import make_result, on_tokens, only_table

# ---------------------------------------------------------------- accuracy, standard errors, LaTeX

TASK = "lm-eval/piqa/0-shot/v1.0"


def make_scored(method, value, *, stderr=None, dense=0.6711, metric="acc", higher=True, **spec):
    """A result whose only score is of another metric."""
    result = make_result(method=method, protocol=TASK, value=value, dense=dense, **spec)
    score = result.scores[0].model_copy(
        update={"metric": metric, "higher_is_better": higher, "stderr": stderr}
    )
    return result.model_copy(update={"scores": [score]})


def scores_of(table):
    return {c.method: next(iter(c.scores.values())) for c in table.cells}


def test_the_best_accuracy_is_the_highest_and_stands_first():
    table = only_table([make_scored(m, v) for m, v in (("a", 0.61), ("b", 0.66), ("c", 0.64))])
    assert [c.method for c in table.cells] == ["dense", "b", "c", "a"]
    assert [m for m, s in scores_of(table).items() if s.best] == ["b"]


def test_a_single_seed_has_the_noise_of_its_documents():
    """0.66 and 0.64, each +-0.01: two standard errors of the difference are 0.0283."""
    rows = [make_scored(m, v, stderr=0.01) for m, v in (("a", 0.66), ("b", 0.64), ("c", 0.63))]
    scores = scores_of(only_table(rows))
    assert scores["b"].within_noise
    assert not scores["c"].within_noise


def test_a_single_seed_of_unknown_noise_is_not_called_equal():
    scores = scores_of(only_table([make_scored(m, v) for m, v in (("a", 0.66), ("b", 0.6599))]))
    assert not scores["b"].within_noise


@pytest.mark.parametrize(("metric", "equal"), [("acc", False), ("token_ppl", True)])
def test_only_perplexities_are_compared_as_losses(metric, equal):
    """Means 0.5 and 0.097, standard errors 0.058: far. In logarithms: -0.7 and -4.4 +- 2.4."""
    how = {"metric": metric, "higher": metric == "acc"}
    rows = [make_scored("a", v, seed=s, **how) for s, v in enumerate((0.4, 0.5, 0.6))]
    rows += [make_scored("b", v, seed=s, **how) for s, v in enumerate((0.0001, 0.09, 0.2))]
    scores = scores_of(only_table(rows))
    (rival,) = [s for m, s in scores.items() if m != "dense" and not s.best]
    assert rival.within_noise is equal


def test_the_spread_of_a_perplexity_over_windows_is_no_noise_of_a_difference():
    """All rows have the same windows: 40 and 41 with 1% each are not called equal by that."""
    rows = [
        make_scored(m, v, stderr=v / 100, metric="token_ppl", higher=False, dense=20.0)
        for m, v in (("a", 40.0), ("b", 41.0), ("c", 42.0))
    ]
    scores = scores_of(only_table(rows))
    assert not scores["b"].within_noise
    assert not scores["c"].within_noise


def one_seed_beside(seeded):
    """Return which single seeds equal the best, 40.0: 40.8 (2.0%) and 41.4 (3.5%)."""
    how = {"metric": "token_ppl", "higher": False, "dense": 20.0}
    singles = {"best": 40.0, "near": 40.8, "far": 41.4}
    rows = [make_scored(name, value, **how) for name, value in singles.items()]
    rows += [make_scored(m, v, seed=s, **how) for m, vs in seeded.items() for s, v in enumerate(vs)]
    scores = scores_of(only_table(rows))
    best = scores["best"]
    assert best.best
    for score in scores.values():  # the sentence below a table is of one mind with its marks
        assert score.best or score.dense is None or within_noise(score, best) == score.within_noise
    return {name for name in singles if scores[name].within_noise}


def test_a_perplexity_of_one_seed_varies_as_those_of_its_rivals_do():
    """Three rivals with deviations near 1%: two standard errors of a difference are 2.8%."""
    of_one_percent = {m: (v * 0.99, v, v * 1.01) for m, v in (("a", 50), ("b", 60), ("c", 70))}
    assert one_seed_beside(of_one_percent) == {"near"}
    # a model that broke varies as no other does, and what has no seeds does not vary at all
    assert one_seed_beside({**of_one_percent, "broken": (1e4, 9e5, 3e7)}) == {"near"}
    assert one_seed_beside({**of_one_percent, "constant": (90.0, 90.0, 90.0)}) == {"near"}
    del of_one_percent["a"]
    assert one_seed_beside(of_one_percent) == set()
    assert one_seed_beside({**of_one_percent, "constant": (90.0, 90.0, 90.0)}) == set()


def test_an_accuracy_is_shown_in_percent_with_what_is_left_of_dense():
    """0.653 / 0.6711 = 0.97303."""
    table = only_table([make_scored("a", 0.653, stderr=0.0042)])
    text = render.score_text(scores_of(table)["a"], bold=("", ""))
    assert text == "65.3% ± 0.4 (97.3% of dense)"
    assert "standard error" in render.legend([table])
    seeds = [make_scored("a", v, seed=s, stderr=0.01) for s, v in enumerate((0.64, 0.66))]
    text = render.score_text(scores_of(only_table(seeds))["a"], bold=("", ""))
    assert text == "65.0% ± 1.4 (96.9% of dense)"  # 0.02 / sqrt(2) = 0.0141


def test_the_dense_row_has_its_own_standard_error():
    result = make_scored("a", 0.65, stderr=0.01)
    score = result.scores[0].model_copy(update={"dense_stderr": 0.02})
    scores = scores_of(only_table([result.model_copy(update={"scores": [score]})]))
    assert render.score_text(scores["dense"], bold=("", "")) == "67.1% ± 2.0"


def test_divergences_have_no_difference_to_dense():
    rows = [make_scored("a", 0.0123, metric="kl_divergence", higher=False, dense=0.0)]
    assert render.score_text(scores_of(only_table(rows))["a"], bold=("", "")) == "0.0123"
    rows = [make_scored("a", 0.25, metric="top1_changed", higher=False, dense=0.0)]
    assert render.score_text(scores_of(only_table(rows))["a"], bold=("", "")) == "25.0%"


# ---------------------------------------------------------------- one protocol, several tokenizers


def test_scores_of_other_tokens_are_no_rivals():
    """Of two folders `final` with two tokenizers, each has a best; theirs cannot be compared."""
    rows = [make_result(method=m, value=v) for m, v in (("wanda", 40.0), ("magnitude", 50.0))]
    others = [make_result(method=m, value=v) for m, v in (("alps", 30.0), ("sparsegpt", 31.0))]
    rows = [on_tokens(row, "a" * 64) for row in rows]
    rows += [on_tokens(row, "b" * 64) for row in others]
    table = only_table(rows)
    first, second = (f"token_ppl wiki/test/512/v1/data-{letter * 8}" for letter in "ab")
    assert set(table.columns) == {first, second} and table.ranked_by is None
    best = {(c.method, key) for c in table.cells for key, s in c.scores.items() if s.best}
    assert best == {("wanda", first), ("alps", second)}
    short = overview([table])
    assert [block.caption[0] for block in short.blocks] == [
        "ppl on wiki/data-aaaaaaaa, dense 20.00", "ppl on wiki/data-bbbbbbbb, dense 20.00",
    ]  # fmt: skip
    assert any(text.startswith("data-HASH: scored on other tokens") for text in short.legend)


def test_models_of_other_names_may_have_other_tokens():
    rows = [on_tokens(make_result(model=name), letter * 64) for name, letter in ("ma", "nb")]
    for name in "mn":
        assert only_table(rows, f"model={name}").columns == ("token_ppl wiki/test/512/v1",)
    tables = compare(rows)
    assert [table.columns for table in tables] == [("token_ppl wiki/test/512/v1",)] * 2


def test_a_run_on_other_tokens_repeats_none():
    """One cell and seed, scored on two versions of the data: both are there, in two columns."""
    rows = [
        on_tokens(make_result(value=v), letter * 64) for v, letter in ((40.0, "a"), (41.0, "b"))
    ]
    (cell,) = (cell for cell in only_table(rows).cells if cell.method == "wanda")
    assert {score.values for score in cell.scores.values()} == {(40.0,), (41.0,)}
