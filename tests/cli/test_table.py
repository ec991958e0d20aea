"""What a terminal shows: no line too wide, no word broken, every value within reach."""

import csv
import io
import time
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.fixtures.generated import generate_results
from prunebench.cli.compare import require_text
from prunebench.cli.fitting import column_lines, length, printable, wrapped
from prunebench.cli.table import overview_lines
from prunebench.errors import UsageError
from prunebench.results.compare import compare
from prunebench.results.overview import overview
from prunebench.results.render import MISSING
from prunebench.results.store import ResultStore
from tests.factories import make_result

ROOT = Path(__file__).parents[2]
PLUGIN = "my_package.pruners.second_order:HessianAwareStructuredPrunerWithCorrections"
FOLDER = "/home/somebody/models/llama-3-8b-instruct-finetuned-with-a-long-name/checkpoint-12000"


@pytest.fixture(scope="module")
def committed():
    """The rows of the default model, from many."""
    rows = ResultStore(ROOT / "results").read(layers=False)[0]
    return compare([row for row in rows if row.spec.model == "smollm2-135m-q4"])


@pytest.fixture(scope="module")
def generated():
    return compare(list(generate_results(2000, blocks=1)))


@pytest.fixture(scope="module")
def odd():
    """Long names, a path as an option, two models, a wide script, no dense value, one seed."""
    path = {"masks": "/home/somebody/a/folder/of/masks/that/never/ends/really/it/does/not/at.npz"}
    results = [
        make_result(), make_result(method=PLUGIN, value=41.0, method_options={**path, "x": 1}),
        make_result(method=PLUGIN, value=42.0, method_options={"masks": "b", "x": 2}),
        make_result(model=FOLDER), make_result(model="模型", method="方法", dense=None),
        make_result(model="模型", value=float("inf")),
    ]  # fmt: skip
    return compare(results)


def texts(tables, *, width, columns=(), **how):
    return [line.text for line in overview_lines(overview(tables, **how), width=width,
                                                 columns=columns)]  # fmt: skip


@pytest.mark.parametrize("every_setting", [False, True])
@pytest.mark.parametrize("name", ["committed", "odd"])
def test_no_line_is_wider_than_the_terminal(request, name, every_setting):
    tables = request.getfixturevalue(name)
    short = overview(tables, every_setting=every_setting, dense_rows=every_setting)
    for width in sorted({*range(80, 201, 7), 81, 100, 120, 160, 200}):
        for line in overview_lines(short, width=width):
            assert length(line.text) <= width, (width, line.text)


@pytest.mark.slow
def test_no_line_of_2000_results_is_wider_than_the_terminal(generated):
    short, full = overview(generated), overview(generated, every_setting=True)
    for width, tables in ((80, short), (97, short), (160, short), (200, short), (80, full)):
        for line in overview_lines(tables, width=width):
            assert length(line.text) <= width, line.text


@pytest.mark.parametrize("name", ["committed", "generated"])
def test_no_word_is_broken(request, name):
    tables = request.getfixturevalue(name)
    short = overview(tables)
    whole = {word for line in overview_lines(short, width=None) for word in line.text.split()}
    whole |= {f"{column.key}," for block in short.blocks for column in block.columns}
    whole |= {column.key for block in short.blocks for column in block.columns}
    whole |= {"hidden:", "(--columns", "NAMES,", "--wide)"}
    for width in (80, 100, 123, 160):
        words = {word for line in overview_lines(short, width=width) for word in line.text.split()}
        assert words <= whole, words - whole


def test_a_path_that_is_longer_than_a_line_ends_it_behind_a_slash(odd):
    lines = texts(odd, width=80)
    assert any(line.endswith("/") for line in lines)
    joined = "".join(line.strip() for line in lines)
    assert "/it/does/not/at.npz" in joined and FOLDER in joined
    assert f"= {PLUGIN}" in " ".join(line.strip() for line in lines).replace(": H", ":H")


def test_every_cell_and_every_column_is_within_reach(committed):
    full = overview(committed, every_setting=True, dense_rows=True)
    (block,) = full.blocks
    lines = [line for section in block.sections for line in section.lines]
    assert {id(line.cell) for line in lines} == {id(cell) for cell in committed[0].cells}
    for column in block.columns:
        shown = "\n".join(
            line.text for line in overview_lines(full, width=None, columns=[column.key])
        )
        for line in lines:
            assert column.text(line.cell).split(" ± ")[0] in shown, column.key
    keys = {column.key for column in block.columns}
    assert {"score", "x_dense", "c4", "acc/piqa/first-500", "acc/hellaswag"} <= keys
    assert {"zeros", "prune", "seeds", "results"} <= keys
    given = {k for k, v in committed[0].cells[-1].settings.items() if v not in (None, {})}
    assert given <= keys


def test_every_score_of_every_cell_is_in_the_widest_table(committed):
    full = overview(committed, every_setting=True, dense_rows=True)
    shown = "\n".join(line.text for line in overview_lines(full, width=None))
    for block in full.blocks:
        scores = [column for column in block.columns if column.value is not None]
        for cell in committed[0].cells:
            for column in scores:
                text = column.text(cell)
                assert text == MISSING or text.split(" ± ")[0] in shown


def test_what_is_left_out_is_named_in_the_last_lines(committed):
    last = " ".join(" ".join(texts(committed, width=80)[-4:]).split())
    assert "hidden: " in last and "c4" in last and "(--columns NAMES, --wide)" in last
    assert "more settings (--all)" in last
    assert "c4," not in " ".join(texts(committed, width=160)[-3:]).split("hidden:")[1].split()[0]


def test_short_names_are_explained_wherever_they_stand(committed):
    lines = texts(committed, width=80)
    assert any("wiki = wiki-sample/held-out/512/v1" in line for line in lines)
    assert any("acc(3) = mean of arc_easy, piqa, winogrande" in line for line in lines)
    hidden = " ".join(" ".join(lines).partition("hidden: ")[2].split())
    assert "acc(3), " in hidden and "piqa" not in hidden


def test_named_columns_are_shown_in_the_order_that_they_are_named(committed):
    lines = texts(committed, width=100, columns=["seeds", "score", "c4"])
    titles = next(line for line in lines if line.startswith("0.5 "))
    assert titles.split() == ["0.5", "seeds", "ppl", "ppl", "c4"]


def test_a_bar_shows_what_is_left():
    results = [make_result(value=v, method=m) for m, v in (("all", 20.0), ("half", 40.0))]
    rows = [line for line in texts(compare(results), width=80) if "█" in line]
    assert [row.count("█") for row in rows] == [8, 4]


def test_an_encoding_without_bars_gets_ascii():
    assert printable("1.0 ± 0.1 · ███▌", "utf-8") == "1.0 ± 0.1 · ███▌"
    assert printable("1.0 ± 0.1 · ███▌", "ascii").isascii()


@pytest.mark.slow
def test_the_time_of_a_table_grows_with_its_rows_and_no_faster():
    """From 500 to 2,000 results: four times the work, not sixteen."""
    results = list(generate_results(2000, blocks=1))

    def took(count):
        begin = time.process_time()
        texts(compare(results[:count]), width=100)
        return time.process_time() - begin

    took(100)  # imports
    assert took(2000) < 9 * min(took(500) for _ in range(2))


# ---------------------------------------------------------------- the commands


@pytest.fixture
def folder(tmp_path):
    store = ResultStore(tmp_path / "results")
    for method, value in (("wanda", 40.0), ("magnitude", 90.0)):
        store.publish(make_result(method=method, value=value, protocol="c4/test/2048/v1"))
    return ["--results-dir", tmp_path / "results"]


def test_csv_and_parquet_hold_the_same_rows(cli, folder, tmp_path):
    rows = list(csv.DictReader(io.StringIO(cli("compare", "-f", "csv", *folder).stdout)))
    parquet = cli("compare", "-f", "parquet", *folder).stdout_bytes
    frame = pd.read_parquet(io.BytesIO(parquet))
    assert list(frame.columns) == list(rows[0])
    assert frame["mean"].tolist() == [float(row["mean"]) for row in rows] == [20.0, 40.0, 90.0]
    assert frame["result_ids"].tolist() == [row["result_ids"] for row in rows]


def test_parquet_is_not_written_to_a_terminal():
    with pytest.raises(UsageError, match="parquet is no text"):
        require_text("parquet", terminal=True)
    require_text("parquet", terminal=False)
    require_text("csv", terminal=True)


def test_a_short_name_selects(cli, folder):
    assert "c4@2048" in cli("compare", "protocol=c4@2048", *folder).stdout
    outcome = cli("compare", "protocol=c4@1024", *folder, code=3)
    assert "did you mean 'c4@2048'?" in outcome.output


def test_options_of_the_table(cli, folder):
    text = cli("compare", "--columns", "score,seeds", "--sort", "prune", *folder).stdout
    assert "prune " not in text and "seeds" in text
    assert " dense " in cli("compare", "--all", *folder).stdout
    assert "c4/test/2048/v1" in cli("compare", "--wide", *folder).stdout
    outcome = cli("compare", "--columns", "seed", *folder, code=2)
    assert "there is no column 'seed'" in outcome.output and "'seeds'" in outcome.output
    assert "there is no column 'x'" in cli("compare", "--sort", "x", *folder, code=2).output
    outcome = cli("compare", "--columns", "seeds", "-f", "csv", *folder, code=2)
    assert "--columns is an option of the table alone" in outcome.output


# ---------------------------------------------------------------- other listings


def test_a_column_without_a_place_stands_below_its_row():
    titles = ["name", "about", "size"]
    rows = [["wanda", "words " * 20, "3"], ["magnitude", "-", "12"]]
    lines = column_lines(titles, rows, unbroken=("name",), right=("size",), width=40)
    assert lines[0].split() == ["name", "size"]
    assert all(len(line) <= 40 for line in lines)
    assert lines[1].split() == ["wanda", "3"] and lines[2].startswith("   words words")
    assert lines[-1].split() == ["magnitude", "12"]
    wide = column_lines(titles, rows, unbroken=("name",), right=("size",), width=None)
    assert len(wide) == 3 and wide[0].split() == titles


def test_a_number_below_its_row_keeps_its_title():
    lines = column_lines(["name", "items"], [["n" * 30, "7"]], unbroken=("name",),
                         right=("items",), width=32)  # fmt: skip
    assert lines == ["name", "n" * 30, "   items 7"]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (None, ["one · two three · four"]),
        (15, ["one · two three", "  four"]),
        (9, ["one · two", "  three", "  four"]),
    ],
)
def test_parts_are_put_one_after_the_other(width, lines):
    assert wrapped(["one", "two three", "four"], width, indent="  ") == lines
