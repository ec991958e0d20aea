"""The table: dense first, seeds folded, noise marked, protocols kept apart."""

import csv
import io
import json

import pytest

from prunebench.errors import MissingResource, UsageError
from prunebench.results import render
from prunebench.results.compare import compare
from prunebench.results.selection import Selection
from tests.factories import make_result, only_table

OTHER = "c4/test/512/v1"


def test_dense_comes_first_even_if_only_others_measured_it():
    table = only_table([make_result(), make_result(method="magnitude", value=90.0)])
    assert [cell.method for cell in table.cells] == ["dense", "wanda", "magnitude"]
    (score,) = table.cells[0].scores.values()
    assert (score.mean, score.seeds) == (20.0, 1)


def test_a_dense_run_s_own_value_counts():
    rows = [make_result(), make_result(method="dense", sparsity="0", value=21.0, dense=21.0)]
    table = only_table(rows)
    assert [cell.method for cell in table.cells] == ["dense", "wanda"]
    assert next(iter(table.cells[0].scores.values())).mean == 21.0


def test_seeds_are_folded():
    rows = [make_result(seed=s, value=v) for s, v in enumerate((40.0, 42.0, 44.0))]
    cell = only_table(rows).cells[1]
    (score,) = cell.scores.values()
    assert (score.mean, score.std, score.seeds) == (42.0, 2.0, 3)
    assert render.score_text(score, bold=("", "")) == "42.00 ± 2.00 (+22.00)"


def test_a_run_beside_other_work_does_not_move_the_time_of_a_row():
    rows = [make_result(seed=seed) for seed in range(3)]
    slow = rows[2].cost.model_copy(update={"prune_seconds": 300.0})
    rows[2] = rows[2].model_copy(update={"cost": slow})
    assert only_table(rows).cells[1].prune_seconds == 3.0


def test_the_newest_of_a_repeated_spec_counts():
    rows = [
        make_result(value=50.0, created="2026-01-02"),
        make_result(value=40.0, created="2026-01-01"),
    ]
    (score,) = only_table(rows).cells[1].scores.values()
    assert (score.mean, score.seeds) == (50.0, 1)


def test_the_seed_of_a_seeded_method_is_no_setting():
    rows = [
        make_result(method="random", seed=s, value=300.0 + s, method_options={"seed": s})
        for s in (0, 1)
    ]
    table = only_table(rows)
    assert len(table.cells) == 2
    assert table.settings == ()


def test_the_best_of_each_sparsity_is_marked():
    rows = [
        make_result(value=40.0), make_result(method="magnitude", value=90.0),
        make_result(sparsity="2:4", value=80.0),
        make_result(method="magnitude", sparsity="2:4", value=70.0),
    ]  # fmt: skip
    best = [
        (c.method, c.sparsity) for c in only_table(rows).cells for s in c.scores.values() if s.best
    ]
    assert best == [("wanda", "0.5"), ("magnitude", "2:4")]


def test_a_single_method_is_not_called_best():
    assert not any(s.best for c in only_table([make_result()]).cells for s in c.scores.values())


def test_a_difference_inside_the_noise_is_marked():
    near = [make_result(method="gblm", seed=s, value=v) for s, v in enumerate((40.0, 41.0, 42.5))]
    top = [make_result(seed=s, value=v) for s, v in enumerate((39.5, 41.0, 42.0))]
    far = [
        make_result(method="magnitude", seed=s, value=v) for s, v in enumerate((60.0, 61.0, 62.0))
    ]
    cells = {c.method: next(iter(c.scores.values())) for c in only_table(near + top + far).cells}
    assert cells["wanda"].best
    assert cells["gblm"].within_noise
    assert not cells["magnitude"].within_noise
    assert render.score_text(cells["gblm"], bold=("*", "*")).startswith("~41.17")


def test_noise_is_judged_on_the_loss_and_not_on_the_exponential():
    """A method whose perplexity is 1e8 give or take 1e8 is not as good as one with 40."""
    wild = [make_result(method="random", seed=s, value=v) for s, v in enumerate((1e6, 2e8, 3e7))]
    top = [make_result(seed=s, value=v) for s, v in enumerate((39.5, 41.0, 42.0))]
    cells = {c.method: next(iter(c.scores.values())) for c in only_table(wild + top).cells}
    assert cells["wanda"].best
    assert not cells["random"].within_noise


def test_two_protocols_never_share_a_column_and_are_not_ranked():
    rows = [make_result(value=40.0), make_result(method="magnitude", value=30.0, protocol=OTHER)]
    table = only_table(rows)
    assert len(table.columns) == 2
    assert table.ranked_by is None
    assert not any(s.best for c in table.cells for s in c.scores.values())
    assert "-" in render.row(table, table.cells[1], bold=("", ""))
    chosen = only_table(rows, f"protocol={OTHER}")
    assert chosen.ranked_by
    assert [c.method for c in chosen.cells] == ["dense", "magnitude"]


def test_a_perplexity_that_only_some_rows_have_does_not_undo_the_ranking():
    rows = [make_result(value=40.0), make_result(method="magnitude", value=60.0)]
    rows.append(make_result(method="magnitude", value=30.0, protocol=OTHER, seed=1))
    table = only_table(rows)
    assert table.ranked_by and OTHER not in table.ranked_by
    assert [c.method for c in table.cells] == ["dense", "wanda", "magnitude"]
    rows.append(make_result(value=50.0, protocol=OTHER, seed=1))
    assert only_table(rows).ranked_by is None


def test_one_protocol_is_ranked_within_a_sparsity():
    rows = [make_result(method=m, value=v) for m, v in (("a", 50.0), ("b", 30.0), ("c", 40.0))]
    rows.append(make_result(method="a", sparsity="0.6", value=10.0))
    assert [(c.method, c.sparsity) for c in only_table(rows).cells[1:]] == [
        ("b", "0.5"), ("c", "0.5"), ("a", "0.5"), ("a", "0.6"),
    ]  # fmt: skip


def test_settings_show_only_where_they_differ():
    rows = [make_result(), make_result(within_block="sequential")]
    table = only_table(rows)
    assert table.settings == ("within_block",)
    assert len(table.cells) == 3
    assert only_table([make_result()]).settings == ()


def test_runs_that_differ_in_evaluation_share_a_row():
    rows = [make_result(), make_result(protocol=OTHER, ppl_seqlen=2048, ppl=("c4",), value=33.0)]
    table = only_table(rows)
    assert len(table.cells) == 2
    assert [round(s.mean) for s in table.cells[1].scores.values()] == [33, 40]


def test_failed_runs_are_not_in_the_table():
    with pytest.raises(MissingResource, match="no result with a score is there") as error:
        compare([make_result(status="failed")])
    assert "1 of 1 runs failed" in str(error.value) and "select" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "methods"),
    [
        (["method=wanda"], {"wanda"}),
        (["method=wanda,magnitude", "sparsity=0.5"], {"wanda", "magnitude"}),
        (["method=w*"], {"wanda"}),
        (["within-block=joint", "device=cpu", "seed=0"], {"wanda", "magnitude"}),
    ],
)
def test_selectors(words, methods):
    rows = [
        make_result(),
        make_result(method="magnitude"),
        make_result(method="random", sparsity="0.6", seed=1),
    ]
    assert {c.method for c in only_table(rows, *words).cells} - {"dense"} == methods


ABLATION = {"steps": 12, "reward": 1e-5, "train": True}


@pytest.mark.parametrize(
    ("words", "methods"),
    [
        (["set.steps=12"], {"wanda"}),
        (["set.steps=1?", "set.reward=1e-5"], {"wanda"}),
        (["set.reward=0.00001", "set.train=true"], {"wanda"}),
        (["set.steps=-"], {"magnitude", "random"}),
        (["set.allocation.low=0.5"], {"random"}),
        (["set.steps=24,12"], {"wanda"}),
    ],
)
def test_options_select(words, methods):
    rows = [
        make_result(method_options=ABLATION),
        make_result(method="magnitude"),
        make_result(method="random", allocation_options={"low": 0.5}),
    ]
    assert {c.method for c in only_table(rows, *words).cells} - {"dense"} == methods


@pytest.mark.parametrize(
    ("word", "says", "near"),
    [
        ("set.stpes=12", "no result has an option set.stpes", "did you mean 'set.steps'?"),
        ("set.steps=13", "no result has set.steps=13", "12"),
    ],
)
def test_an_option_that_no_result_has(word, says, near):
    with pytest.raises(MissingResource) as error:
        compare([make_result(method_options=ABLATION)], Selection.parse([word]))
    assert says in str(error.value) and near in str(error.value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("methd=wanda", "did you mean 'method'?"),
        ("wanda", "not a selector"),
        ("method=", "not a selector"),
    ],
)
def test_bad_selectors(word, says):
    with pytest.raises(UsageError) as error:
        Selection.parse([word])
    assert says in str(error.value)


def test_a_selector_that_is_there_twice_is_refused():
    with pytest.raises(UsageError, match="within_block is selected twice") as error:
        Selection.parse(["within-block=joint,sequential", "method=wanda", "within_block=joint,x"])
    assert error.value.fix == "use within_block=joint,sequential,x"


def test_an_empty_selection_says_how_many_there_are():
    rows = [make_result(), make_result(method="magnitude", sparsity="0.6")]
    with pytest.raises(MissingResource, match="no result is selected") as error:
        compare(rows, Selection.parse(["method=wanda", "sparsity=0.6"]))
    assert "2 finished results" in error.value.where
    # each value is there, but not together: the last one is named, with what the others leave
    assert "none with method=wanda has sparsity=0.6" in str(error.value)
    assert error.value.fix == "did you mean '0.5'? Known: 0.5"


def test_a_protocol_that_the_selected_model_has_not_names_those_it_has():
    rows = [make_result(model="a", protocol="wiki-sample/held-out/512/bos-window/v1")]
    rows.append(make_result(model="b", protocol="wiki-sample/held-out/512/v1"))
    with pytest.raises(MissingResource) as error:
        compare(rows, Selection.parse(["model=a", "protocol=wiki"]))
    assert "none with model=a has protocol=wiki" in str(error.value)
    assert "wiki/bos-window" in str(error.value.fix)


@pytest.mark.parametrize(
    ("words", "says", "near"),
    [
        (["metric=token_pl"], "no result has metric=token_pl", "did you mean 'token_ppl'?"),
        (["method=wanda,wan*", "sparsity=0.51"], "has sparsity=0.51", "did you mean '0.5'?"),
        (["method=wnda", "sparsity=0.5"], "has method=wnda", "did you mean 'wanda'?"),
        (["seed=7"], "has seed=7", "Known: 0"),
        (["method=z*"], "has method=z*", "Known: magnitude, wanda"),
    ],
)
def test_a_value_that_no_result_has_names_the_nearest(words, says, near):
    rows = [make_result(), make_result(method="magnitude", sparsity="0.6")]
    with pytest.raises(MissingResource) as error:
        compare(rows, Selection.parse(words))
    assert says in str(error.value) and near in str(error.value)


def test_no_result_at_all_is_not_the_selectors_fault():
    with pytest.raises(MissingResource, match="no result with a score is there"):
        compare([], Selection.parse(["method=gblm"]))


def test_markdown_escapes_what_a_name_could_break():
    text = render.to_markdown(compare([make_result(model="a|b<script>")]))
    assert "## a\\|b&lt;script>" in text
    assert text == render.to_markdown(compare([make_result(model="a|b<script>")]))


def test_csv_has_full_precision():
    text = render.to_csv(compare([make_result(value=1 / 3)]))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in rows] == ["dense", "wanda"]
    assert float(rows[1]["mean"]) == 1 / 3


def test_json_is_one_document():
    (table,) = json.loads(render.to_json(compare([make_result()])))
    assert table["cells"][1]["scores"]["token_ppl wiki/test/512/v1"]["mean"] == 40.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (19.738, "19.74"),
        (125.8, "125.8"),
        (1087.96, "1,088"),
        (999_499.0, "999,499"),
        (999_501.0, "1.00e6"),
        (49_667_550.0, "4.97e7"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_readable(value, text):
    assert render.number(value) == text


def test_latex_has_rules_bold_and_plus_minus():
    rows = [make_result(seed=s, value=v) for s, v in enumerate((40.0, 42.0, 44.0))]
    rows.append(make_result(method="magnitude", value=90.0))
    text = render.to_latex(compare(rows))
    assert r"wanda & 0.5 & \textbf{42.00 $\pm$ 2.00} (+22.00) & 50.0\% & 3 s & 3 \\" in text
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {5}
    assert r"\begin{tabular}{llrrrr}" in text


def test_latex_escapes_what_a_name_could_break():
    text = render.to_latex(compare([make_result(model="50%_of {a}\\b&c#$~^\n<x>")]))
    assert (
        r"50\%\_of \{a\}\textbackslash{}b\&c\#\$$\sim$\textasciicircum{} $<$x$>$: mean" in text
    )  # fmt: skip


def test_latex_makes_one_table_a_model():
    text = render.to_latex(compare([make_result(model="a"), make_result(model="b")]))
    assert text.count(r"\begin{table}") == 2
    assert text.index(r"\caption{a:") < text.index(r"\caption{b:")


def test_many_options_show_only_where_rows_of_a_method_differ():
    rows = [make_result(method_options={"alpha": a, "beta": 1}, value=40.0 + a) for a in (1, 2)]
    rows.append(make_result(method="magnitude", method_options={"beta": 2}))
    shown = {c.method: c.shown["method_options"] for c in only_table(rows).cells[1:]}
    assert shown["magnitude"] is None
    assert {c.shown["method_options"]["alpha"] for c in only_table(rows).cells if
            c.method == "wanda"} == {1, 2}  # fmt: skip
    assert "beta" not in shown["wanda"]


def test_what_most_rows_have_is_said_once():
    base = {"steps": 12, "noise": 0.0, "beta": 1}
    changes = ({}, {"noise": 1.0}, {"steps": 24})
    rows = [make_result(method_options=base | change, value=40.0) for change in changes]
    table = only_table(rows)
    shown = [c.shown["method_options"] for c in table.cells[1:]]
    assert sorted(map(str, shown)) == sorted(map(str, [change or None for change in changes]))
    assert table.usual == {"wanda": {"noise": 0.0, "steps": 12}}
    assert "wanda where it says nothing else: noise=0.0 steps=12" in render.to_markdown([table])
    assert only_table(rows[:2]).usual == {}  # of two, none is the usual one
    assert render.to_json([table]).count('"beta": 1') == 3  # data name everything


def test_a_hash_among_options_is_cut_like_any_other():
    options = {"prior": "sha256:" + "a" * 64, "masks": None}
    assert render.setting_text(options) == "masks=None prior=sha256:aaaaaaaaaaaa"
