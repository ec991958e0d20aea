"""The short table: which rows it has, in which order, and what is said about them."""

from pathlib import Path

import pytest

from prunebench.errors import UsageError
from prunebench.results.cell_score import within_noise
from prunebench.results.columns import duration, plus_minus, task_means, times
from prunebench.results.compare import compare
from prunebench.results.finding import finding
from prunebench.results.names import short_method, short_names, short_protocol
from prunebench.results.overview import overview
from prunebench.results.overview_markdown import overview_markdown
from prunebench.results.store import ResultStore
from tests.factories import blocks_of, make_result, recovered, rows_of, with_tasks

ROOT = Path(__file__).parents[2]

WIKI2 = "wikitext2-raw/test/2048/v1"
C4 = "c4/validation/2048/v1"


# ---------------------------------------------------------------- rows


def test_one_row_a_method_its_main_setting_and_a_better_one():
    ablations = [
        make_result(method="maskllm", method_options={"steps": 12, "noise": float(n)}, value=70 + n)
        for n in range(4)
    ]
    main = [
        make_result(method="maskllm", method_options={"steps": 24, "noise": 9.0}, seed=s, value=80)
        for s in range(3)
    ]
    (block,) = blocks_of([*ablations, *main, make_result(value=75.0)])
    rows = rows_of(block)["0.5"]
    assert [(words, score) for words, score, _ in rows] == [
        ("*maskllm steps=12", "70.00"), ("wanda", "75.00"),
        ("maskllm noise=9.0", "80.00 ± 0.00"),
    ]  # fmt: skip
    assert rows[2][2] == "+ 3 settings (71.00 to 73.00): --all"
    assert block.hidden_settings == 3


def test_a_single_other_setting_is_shown_and_not_noted():
    rows = [make_result(), make_result(within_block="sequential", value=41.0)]
    (block,) = blocks_of([*rows, make_result(method="magnitude", value=90.0)])
    assert [row[0] for row in rows_of(block)["0.5"]] == ["*wanda", "wanda sequential", "magnitude"]
    assert block.hidden_settings == 0


def test_every_setting_is_shown_on_demand():
    results = [make_result(calibration_samples=n, value=40 + n / 10) for n in (8, 16, 32, 64)]
    (short,), (full,) = blocks_of(results), blocks_of(results, every_setting=True)
    assert sum(len(section.lines) for section in short.sections) < 4
    assert len(full.sections[0].lines) == 4


def test_equal_scores_of_two_settings_leave_the_best_marked():
    results = [make_result(method_options={"a": a}, seed=s) for a in (1, 2, 3) for s in (0, 1)]
    (block,) = blocks_of([*results, make_result(method="magnitude", value=90.0)])
    assert rows_of(block)["0.5"][0][0].startswith("*wanda")


def test_sections_are_ordered_by_ratio_and_rows_from_best_to_worst():
    results = [
        make_result(method=m, value=v, sparsity=s)
        for s in ("0.7", "2:4", "0.5") for m, v in (("a", 50.0), ("b", 30.0), ("c", 40.0))
    ]  # fmt: skip
    (block,) = blocks_of(results)
    assert [section.title for section in block.sections] == ["0.5", "2:4", "0.7"]
    assert [row[0] for row in rows_of(block)["2:4"]] == ["*b", "c", "a"]


def test_a_column_orders_the_rows():
    slow = make_result(method="slow", value=30.0)
    cost = slow.cost.model_copy(update={"prune_seconds": 900.0})
    results = [slow.model_copy(update={"cost": cost}), make_result()]
    (block,) = blocks_of(results, sort="prune")
    assert [row[0] for row in rows_of(block)["0.5"]] == ["wanda", "*slow"]
    with pytest.raises(UsageError) as error:
        blocks_of(results, sort="prunes")
    assert "did you mean 'prune'?" in error.value.fix


def test_a_broken_model_is_last_and_says_so():
    results = [make_result(value=float("nan")), make_result(method="b", value=float("inf"))]
    (block,) = blocks_of([*results, make_result(method="c", value=50.0)])
    assert [row[:2] for row in rows_of(block)["0.5"]] == [
        ("*c", "50.00"), ("b", "inf"), ("wanda", "nan"),
    ]  # fmt: skip


def test_one_seed_that_broke_is_not_left_out_of_the_mean():
    (block,) = blocks_of([make_result(seed=s, value=v) for s, v in ((0, 40.0), (1, float("nan")))])
    assert rows_of(block)["0.5"][0][1].startswith("nan")


# ---------------------------------------------------------------- protocols and tasks


def test_two_protocols_are_two_rankings():
    results = [make_result(method=m, value=v, protocol=WIKI2) for m, v in (("a", 9.0), ("b", 8.0))]
    results += [
        make_result(method=m, value=v, protocol=C4, seed=1) for m, v in (("a", 6.0), ("b", 7.0))
    ]
    tables = compare(results)
    assert tables[0].ranked_by is None
    first, second = overview(tables).blocks
    assert {block.caption[0] for block in (first, second)} == {
        "ppl on c4@2048, dense 20.00", "ppl on wikitext2@2048, dense 20.00",
    }  # fmt: skip
    assert [row[0] for row in rows_of(first)["0.5"]] == ["*a", "b"]
    assert [row[0] for row in rows_of(second)["0.5"]] == ["*b", "a"]


def test_a_row_without_the_leading_score_is_not_lost():
    results = [make_result(), make_result(method="b", value=50.0), with_tasks("c", piqa=0.6)]
    blocks = blocks_of(results)
    assert [block.caption[0].split(",")[0] for block in blocks] == ["ppl on wiki", "acc on piqa"]
    assert [row[0] for row in rows_of(blocks[1])["0.5"]] == ["c"]


def test_accuracies_of_several_tasks_are_one_column():
    tasks = {"piqa": 0.6, "arc_easy": 0.5, "winogrande": 0.7}
    result = with_tasks("wanda", **tasks)
    scores = [*result.scores, *make_result().scores]
    (block,) = blocks_of([result.model_copy(update={"scores": scores})])
    column = next(column for column in block.columns if column.key == "acc")
    (line,) = block.sections[0].lines
    assert (column.title, column.text(line.cell)) == ("acc(3)", "60.0%")
    assert {"acc/piqa", "acc/arc_easy", "acc/winogrande"} <= {c.key for c in block.columns}


def test_a_mean_is_over_the_tasks_that_most_rows_share():
    both = {"piqa": 0.6, "rte": 0.5}
    rows = [with_tasks("a", **both), with_tasks("b", **both), with_tasks("c", rte=0.9, boolq=0.9)]
    (mean,) = task_means(compare(rows)[0].cells)
    assert mean.tasks == ["piqa", "rte"]
    cells = {cell.method: cell for cell in compare(rows)[0].cells}
    assert mean.of(cells["c"]) is None
    score = mean.of(cells["a"])
    assert score.mean == pytest.approx(0.55)
    assert score.stderr == pytest.approx((0.01**2 + 0.01**2) ** 0.5 / 2)


def test_tasks_that_were_asked_in_another_way_are_not_folded_together():
    one = with_tasks("a", piqa=0.6, rte=0.5)
    other = with_tasks("b", asked="5-shot/v1.0", piqa=0.6, rte=0.5)
    assert [m.title for m in task_means(compare([one, other])[0].cells)] == [
        "acc(2)/0-shot", "acc(2)/5-shot",
    ]  # fmt: skip
    both = one.model_copy(update={"scores": [*one.scores, *other.scores]})
    columns = blocks_of([both])[0].columns
    assert {"score", "acc(2)/5-shot", "acc/rte/5-shot"} <= {c.key for c in columns}


def test_a_difference_of_means_inside_their_noise_is_marked():
    rows = [with_tasks(m, stderr=0.02, piqa=v, rte=v) for m, v in (("a", 0.6), ("b", 0.59))]
    (block,) = blocks_of([*rows, with_tasks("c", stderr=0.02, piqa=0.4, rte=0.4)])
    assert [row[0] for row in rows_of(block)["0.5"]] == ["*a", "~b", "c"]
    assert "(within noise of it: b; c 57.1%)" in finding(block)


# ---------------------------------------------------------------- what is said


def test_what_most_rows_share_is_said_once():
    results = [make_result(method=m, value=v) for m, v in (("a", 50.0), ("b", 30.0))]
    results.append(make_result(method="c", calibration="wiki-sample/rest", dtype="bfloat16"))
    (block,) = blocks_of(results)
    caption = " ".join(block.caption)
    assert "calibrated on c4 32x512" in caption and "float32" in caption
    assert "pruned on cpu, 2 threads" in caption
    assert "20.00 (float32)" in caption and "20.00 (bfloat16)" in caption
    assert ("c bfloat16 calibration=wiki", "40.00", "") in rows_of(block)["0.5"]


@pytest.mark.parametrize(
    ("counts", "says"), [((1, 4), "1 or 4 threads"), ((16, 1, 4), "1 to 16 threads")]
)
def test_rows_of_several_numbers_of_threads(counts, says):
    results = [
        (result := make_result(method=f"m{n}")).model_copy(
            update={"hardware": result.hardware.model_copy(update={"cpu_threads": n})}
        )
        for n in counts
    ]
    (block,) = blocks_of(results)
    assert f"pruned on cpu, {says}" in block.caption


def test_the_sentence_is_computed_from_the_rows():
    values = {"0.5": (40.0, 90.0), "2:4": (60.0, 50.0)}
    results = [
        make_result(method=m, value=v, sparsity=s)
        for s, both in values.items() for m, v in zip(("wanda", "magnitude"), both, strict=True)
    ]  # fmt: skip
    (block,) = blocks_of(results)
    assert finding(block) == (
        "At 0.5 wanda is best with 2.00 times the perplexity of dense (magnitude 4.50); "
        "at 2:4 magnitude with 2.50 (wanda 3.00)."
    )


def test_the_sentence_compares_main_settings_and_names_better_ones_by_their_method():
    def row(method, value, **how):
        return [make_result(method=method, value=value + seed / 10, seed=seed, **how)
                for seed in range(2)]  # fmt: skip

    results = [*row("wanda", 40.0), *row("alps", 36.0), *row("sparsegpt", 44.0)]
    results.append(make_result(method="sparsegpt", value=30.0, calibration="wiki-sample/rest"))
    trained = {"train_data": "wiki-sample/rest", "prior": "sha256:" + "a" * 64}
    results.append(make_result(method="maskllm", value=28.0, method_options=trained))
    (block,) = blocks_of(results)
    assert rows_of(block)["0.5"][0][0].startswith("*maskllm")
    assert finding(block) == (
        "At 0.5 alps is best with 1.80 times the perplexity of dense (wanda 2.00, sparsegpt 2.20), "
        "with other settings maskllm reaches 1.40 and sparsegpt reaches 1.50."
    )
    # what is inside the noise of the best main setting is no better one
    near = make_result(method="wanda", value=36.0, within_block="sequential")
    (block,) = blocks_of([*row("wanda", 40.0), *row("alps", 36.0), near])
    assert "other settings" not in finding(block)


def test_methods_are_compared_in_the_setting_that_most_of_them_have():
    def row(method, value, **options):
        return make_result(
            method=method, value=value, recover="block", recover_options=options or {}
        )

    results = [
        make_result(method=method, value=value)
        for method, value in (("alps", 38.0), ("wanda", 44.0), ("sparsegpt", 42.0))
    ]
    # one of the three has the default too: it is no match for the others' better loss
    results += [
        row(method, value, loss="channels")
        for method, value in (("alps", 30.0), ("wanda", 34.0), ("sparsegpt", 32.0))
    ]
    results.append(row("alps", 36.0, loss="cauchy"))
    (block,) = blocks_of(results)
    assert finding(block) == (
        "At 0.5 alps + block is best with 1.50 times the perplexity of dense (sparsegpt + block "
        "1.60 to wanda 2.20)."
    )


def test_a_recovery_that_learned_from_the_scored_kind_of_text_is_no_headline():
    rows = [make_result(method="wanda", value=40.0), make_result(method="alps", value=36.0)]
    for text in ("wiki-sample/rest", "c4-sample/rest,wiki-sample/rest"):
        taught = make_result(
            method="wanda", value=25.0, recover="distill", recover_options={"data": text}
        )
        (block,) = blocks_of([*rows, taught])
        assert finding(block) == (
            "At 0.5 alps is best with 1.80 times the perplexity of dense (wanda 2.00), with other "
            "settings wanda + distill reaches 1.25."
        )


def test_where_all_rows_saw_the_scored_kind_of_text_they_are_compared():
    results = [make_result(method=m, value=v, calibration="wiki-sample/rest")
               for m, v in (("wanda", 40.0), ("alps", 36.0))]  # fmt: skip
    (block,) = blocks_of(results)
    assert finding(block).startswith("At 0.5 alps is best with 1.80 times")


def test_noise_between_two_scores_is_that_which_marks_rows():
    results = [
        make_result(method=method, value=value * (1 + spread * seed), seed=seed)
        for method, value, spread in (("a", 40.0, 0.02), ("b", 41.0, 0.02), ("c", 43.0, 0.001),
                                      ("d", 40.5, 0.0), ("e", 1e6, 0.5))
        for seed in range(3)
    ]  # fmt: skip
    results += list(ResultStore(ROOT / "results").read(layers=False)[0])
    compared = 0
    for table in compare(results):
        for column in table.columns:
            for sparsity in {cell.sparsity for cell in table.cells if cell.method != "dense"}:
                rivals = [c.scores[column] for c in table.cells
                          if c.sparsity == sparsity and column in c.scores]  # fmt: skip
                for best in (score for score in rivals if score.best):
                    others = [score for score in rivals if score is not best]
                    compared += len(others)
                    assert all(within_noise(s, best) == s.within_noise for s in others)
    assert compared > 50


def test_where_nothing_can_be_compared_there_is_no_sentence():
    (block,) = blocks_of([make_result()])
    assert finding(block) == ""
    (block,) = blocks_of([make_result(dense=None), make_result(method="b", dense=None)])
    assert finding(block) == ""


def test_the_short_table_as_markdown():
    results = [make_result(), make_result(method="a|b", value=90.0)]
    text = overview_markdown(overview(compare(results)))
    assert "| 0.5 | wanda |  | **40.00** | 2.00 | 3 s | 1 |" in text
    assert "| 0.5 | a\\|b |" in text
    assert text == overview_markdown(overview(compare(results[::-1])))


# ---------------------------------------------------------------- names and numbers


@pytest.mark.parametrize(
    ("protocol", "short"),
    [
        ("wiki-sample/held-out/512/v1", "wiki"),
        ("c4-sample/held-out/512/v1", "c4"),
        ("wikitext2-raw/test/2048/v1", "wikitext2@2048"),
        ("wikitext2-raw/test/2048/bos-window/v1", "wikitext2@2048/bos-window"),
        ("wiki-sample/held-out/512/v1/first-2048", "wiki/first-2048"),
        ("lm-eval/arc_easy/0-shot/v1.0/first-100", "arc_easy"),
        ("odd", "odd"),
    ],
)
def test_protocols_have_short_names(protocol, short):
    assert short_protocol(protocol) == short


def test_names_that_would_be_one_stay_long():
    assert short_names(["a:X", "b:X", "b:Y", "wanda"], short_method) == {
        "a:X": "a:X", "b:X": "b:X", "b:Y": "Y", "wanda": "wanda",
    }  # fmt: skip


def test_each_part_of_a_method_with_recoveries_is_shortened():
    names = {
        "wanda + my_pkg.rec:Mine": "wanda + Mine",
        "my.pruners:Own + block+my_pkg.rec:Mine": "Own + block+Mine",
    }
    assert short_names(names, short_method) == names


def test_tasks_asked_in_several_ways_are_told_apart_by_what_differs():
    asked = ["lm-eval/rte/0-shot/v1.0/first-100", "lm-eval/rte/5-shot/v1.0/first-100",
             "lm-eval/piqa/0-shot/v1.0/first-100"]  # fmt: skip
    assert list(short_names(asked, short_protocol).values()) == ["rte/0-shot", "rte/5-shot", "piqa"]
    limits = ["lm-eval/rte/0-shot/v1.0", "lm-eval/rte/0-shot/v1.0/first-100"]
    assert list(short_names(limits, short_protocol).values()) == ["rte", "rte/first-100"]
    # what is told apart is still not the short name of another
    odd = ["rte/first-100", *limits]
    assert list(short_names(odd, short_protocol).values()) == [odd[0], "rte", limits[1]]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.49, "0.5 s"), (45.0, "45 s"), (59.99, "1.0 m"), (208.0, "3.5 m"),
     (1461.0, "24 m"), (4300.0, "1.2 h"), (200_000.0, "2.3 d")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(1.834, "1.83"), (14.0, "14.0"), (9.999, "10.0"), (408.2, "408"), (1840.0, "1,840"),
     (2_516_000.0, "2.52e6")],
)  # fmt: skip
def test_ratios(ratio, text):
    assert times(ratio) == text


def test_a_deviation_has_the_decimals_of_its_mean():
    def text(*values):
        results = [make_result(seed=s, value=v) for s, v in enumerate(values)]
        return plus_minus(next(iter(compare(results)[0].cells[1].scores.values())))

    assert text(122.0, 124.0) == "123.0 ± 1.4"
    assert text(41.0, 42.0) == "41.50 ± 0.71"
    assert text(1e7, 3e7) == "2.00e7 ± 1.41e7"


def test_of_two_options_of_one_name_that_of_the_recovery_says_so():
    """`steps` is one of MaskLLM's too: where both are shown, the words are those of --set."""
    results = [
        make_result(
            method=method, value=value, recover="distill", method_options=options,
            recover_options={"steps": 12, "rank": 8},
        )
        for method, value, options in (("maskllm", 40.0, {"steps": 13}), ("wanda", 50.0, {}))
    ]  # fmt: skip
    (block,) = blocks_of(results)
    assert [row[0] for row in rows_of(block)["0.5"]] == [
        "*maskllm + distill steps=13 rank=8 recover.steps=12",
        "wanda + distill rank=8 steps=12",
    ]
    assert not any("recover" in part for part in block.caption)  # every row names its own


def test_a_method_with_recovery_is_a_row_of_its_own_with_the_time_of_both():
    results = [make_result(method="wanda", value=40.0), recovered("wanda", 30.0)]
    (block,) = blocks_of(results)
    assert rows_of(block)["0.5"] == [("*wanda + block", "30.00", ""), ("wanda", "40.00", "")]
    times = {column.key: column for column in block.columns}
    first, second = block.sections[0].lines
    assert times["recover_seconds"].text(first.cell) == "2.0 m"
    assert times["recover_seconds"].text(second.cell) == "-"
    assert "wanda + block is best" in finding(block)
