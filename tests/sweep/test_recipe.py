"""Recipes: grids, expectations, and mistakes named with file, line and nearest key."""

import json
import shlex
from pathlib import Path

import pytest

from prunebench.errors import UsageError
from prunebench.results.published import published_values
from prunebench.sweep.recipe import read_recipe
from prunebench.sweep.sweep import parse_shard, shard

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, **how):
        path = tmp_path / "r.toml"
        path.write_text(text)
        return read_recipe(path, **how)

    return write


def test_a_single_run(recipe):
    single = recipe('method = "wanda"\nsparsity = "2:4"\n[set]\nalpha = 100\n')
    assert single.single() == {"method": "wanda", "sparsity": "2:4", "set": {"alpha": 100}}


def test_a_run_may_leave_the_method_to_a_flag(recipe):
    assert recipe("seqlen = 64\n").single() == {"seqlen": 64}
    with pytest.raises(UsageError, match="no method is named"):
        recipe("seqlen = 64\n", complete=True)


GRID = """
about = "a grid"
seqlen = 64
ppl = ["wiki", "c4"]
set = { seed = 3 }

[[grid]]
method = "dense"

[[grid]]
method = ["magnitude", "wanda"]
sparsity = [0.5, "2:4"]

[[grid]]
method = "gblm"
set = { alpha = [1, 50], norm = "l2" }
tasks = ["piqa", "rte"]

[[grid]]
method = "wanda"  # the same again
sparsity = "2:4"
"""


def test_a_grid(recipe):
    grid = recipe(GRID)
    with pytest.raises(UsageError, match="grid of 7 cells"):
        grid.single()
    values = [(c.values["method"], c.values["sparsity"]) for c in grid.cells]
    assert values == [
        ("dense", "0"), ("magnitude", "0.5"), ("magnitude", "2:4"), ("wanda", "0.5"),
        ("wanda", "2:4"), ("gblm", "0.5"), ("gblm", "0.5"),
    ]  # fmt: skip
    assert [c.number for c in grid.cells] == list(range(1, 8))
    last = grid.cells[-1]
    assert last.values["method_options"] == {"seed": 3, "alpha": 50, "norm": "l2"}
    assert last.values["ppl"] == ("wiki", "c4") and last.values["tasks"] == ("piqa", "rte")
    assert shlex.join(last.arguments) == (
        "--seqlen 64 --ppl wiki,c4 --set seed=3 --set alpha=50 --set norm=l2 --method gblm "
        "--tasks piqa,rte"
    )


def test_selecting_cells(recipe):
    grid = recipe(GRID)
    assert len(grid.select([])) == 7
    assert [c.number for c in grid.select(["method=wanda,magnitude", "sparsity=2:4"])] == [3, 5]
    assert [c.number for c in grid.select(["method=m*"])] == [2, 3]
    assert [c.number for c in grid.select(["tasks=rte"])] == [6, 7]
    assert len(grid.select(["tasks=None", "ppl=c4"])) == 5
    assert [c.number for c in grid.select(["set.alpha=50"])] == [7]
    assert [c.number for c in grid.select(["set.alpha=-", "method=wanda"])] == [4, 5]
    for words, says in (
        (["method=wnda"], ["no cell", "method wnda", "did you mean 'wanda'?"]),
        (
            ["method=gblm", "sparsity=2:4", "seed=0"],
            ["has method=gblm and sparsity=2:4 together", "with method=gblm, sparsity is 0.5"],
        ),
        (["tasks=piq"], ["tasks piq", "did you mean 'piqa'? Known: None, piqa, rte"]),
        (["set.alpha=51"], ["no cell", "set.alpha 51", "Known: -, 1, 50"]),
        (["set.alhpa=50"], ["unknown selector 'set.alhpa'", "did you mean 'set.alpha'?"]),
        (["colour=red"], ["unknown selector 'colour'"]),
        (["wanda"], ["is not a selector"]),
    ):
        with pytest.raises(UsageError) as error:
            grid.select(words)
        assert all(part in str(error.value) for part in says)


def test_shards_are_a_partition(recipe):
    cells = recipe(GRID).cells
    parts = [shard(cells, i, 3) for i in (1, 2, 3)]
    assert sorted(c.number for part in parts for c in part) == list(range(1, 8))
    assert parse_shard("2/3") == (2, 3)
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(UsageError, match="--shard"):
            parse_shard(wrong)


WRONG = [
    ('method = "wanda"\n\nsparsty = "2:4"\n', ["'sparsty'", "line 3", "did you mean 'sparsity'?"]),
    ('method = "wanda"\nseqlen = "long"\n', ["seqlen = 'long'", "line 2", "int"]),
    ("seqlen = true\n", ["seqlen = True", "line 1"]),
    ("method = \n", ["not TOML", "line 1"]),
    ("sparsity = 2:4\n", ["not TOML"]),
    ('[[grid]]\nmethod = "dense"\n[[grid]]\nmethod = "wanda"\nsed = 1\n', ["'sed'", "line 5"]),
    ('[[grid]]\nmethod = ["wanda", 3]\n', ["method = 3", "line 2", "str"]),
    ('[[grid]]\nmethod = "wanda"\nseed = []\n', ["leaves no cell", "line 3"]),
    ('grid = 3\nmethod = "wanda"\n', ["grid = 3", "line 1"]),
    ('grid = [3]\nmethod = "wanda"\n', ["grid is not a table", "[[grid]]"]),
    ('[[grid]]\nmethod = ["wanda", "wnda"]\n', ["'wnda'", "cell 2", "did you mean 'wanda'?"]),
    ('[[grid]]\nmethod = "wanda"\nsparsity = "half"\n', ["'half'", "cell 1", "method wanda"]),
    ('method = "wanda"\n[needs]\ngpu = 3\n', ["'gpu'", "line 3", "gpu_memory_gb"]),
    (
        'method = "wanda"\n[needs]\ngpu_memory_gb = { opt-125m = "19 GB" }\n',
        ["opt-125m = '19 GB'", "line 2", "int or float"],
    ),
    ('method = "wanda"\ntasks = ["piqa", 5]\n', ["tasks = 5", "line 2", "str"]),
    ('[[grid]]\nmethod = "wanda"\nppl = [["wiki"], ["c4"]]\n', ["ppl = ['wiki']", "line 3"]),
    ('method = "wanda"\n[[expect]]\nvalue = 3\n', ["no tolerance", "line 2"]),
    ('method = "wanda"\n[[expect]]\ntolerance = 3\n', ["no 'method'", "line 2"]),
    ('method = "wanda"\n[[expect]]\nvlaue = 3\n', ["'vlaue'", "line 3", "'value'"]),
    (
        'method = "wanda"\n[[expect]]\npaper = "2306.1169"\ntolerance = 0.1\n',
        ["no published value", "line 2", "'2306.11695'"],
    ),
    (
        'method = "wanda"\n[[expect]]\npaper = "2306.11695"\ntable = "Table 33"\ntolerance = 0.1\n',
        ["no 'Table 33'", "did you mean 'Table 3'?"],
    ),
    (
        'method = "wanda"\n[[expect]]\npaper = "2306.11695"\nvalue = 1\ntolerance = 0.1\n',
        ["'value' does not go with paper"],
    ),
    (
        'method = "wanda"\n[[expect]]\npaper = "2306.11695"\ntolerance = 0.1\n',
        ["no cell of the recipe can meet", "line 2"],
    ),
]


@pytest.mark.parametrize(("text", "says"), WRONG)
def test_a_mistake_names_file_line_and_way_out(recipe, text, says):
    with pytest.raises(UsageError) as error:
        recipe(text)
    for part in [*says, "r.toml"]:
        assert part in str(error.value)


def test_a_missing_recipe(tmp_path):
    with pytest.raises(UsageError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")


PAPER = """
model = "llama2-7b"
ppl = "wikitext2"
ppl_seqlen = 4096
[[grid]]
method = ["dense", "wanda"]
[[grid]]
method = "wanda"
sparsity = "2:4"
[[expect]]
paper = "2306.11695"
table = "Table 3"
tolerance = 0.02
"""


def test_expectations_of_a_paper_are_its_cells_that_the_recipe_runs(recipe):
    expected = recipe(PAPER).expectations
    mine = {
        (v.method, v.sparsity): v.value
        for v in published_values()
        if (v.paper, v.table, v.model) == ("2306.11695", "Table 3", "llama2-7b")
        and (v.method, v.sparsity) in {("dense", "0"), ("wanda", "0.5"), ("wanda", "2:4")}
    }
    assert len(mine) == 3
    assert {(e.value.method, e.value.sparsity): e.value.value for e in expected} == mine
    assert {e.tolerance for e in expected} == {0.02}


def test_another_protocol_meets_nothing(recipe):
    for change in (("4096", "2048"), ('"wikitext2"', '"c4"'), ('"llama2-7b"', '"opt-125m"')):
        with pytest.raises(UsageError, match="no cell of the recipe can meet"):
            recipe(PAPER.replace(*change))


def test_a_measured_expectation(recipe):
    text = (
        'ppl = "wiki"\n[[grid]]\nmethod = "wanda"\nallocation = ["uniform", "dlp"]\n'
        'sparsity = 0.7\n[[expect]]\nmethod = "wanda"\nallocation = "dlp"\nsparsity = 0.7\n'
        'protocol = "wiki-sample/held-out/512/v1"\nvalue = 292.5\ntolerance = 0.1\n'
    )
    (expectation,) = recipe(text).expectations
    assert (expectation.value.value, expectation.value.allocation, expectation.value.paper) == (
        292.5,
        "dlp",
        "",
    )
    with pytest.raises(UsageError, match="no cell of the recipe can meet"):
        recipe(text.replace("held-out/512", "held-out/256"))


def test_an_expectation_of_quantized_weights_says_their_bits(recipe):
    text = 'method = "gptq"\nppl = "wiki"\n[[expect]]\nmethod = "gptq"\nsparsity = 0\nbits = 4\n'
    text += 'protocol = "wiki-sample/held-out/512/v1"\nvalue = 22.5\ntolerance = 0.1\n'
    (expectation,) = recipe(text).expectations
    assert expectation.value.bits == 4
    with pytest.raises(UsageError, match="'bits' does not go with paper"):
        recipe(text.replace('method = "gptq"\nspar', 'paper = "2306.11695"\nspar'))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_our_recipes_are_valid(cli, path):
    output = cli("validate", path).stdout
    assert "cell" in output and "expected value" in output
    assert read_recipe(path).about


def test_there_are_recipes():
    assert {"laptop", "wanda", "sparsegpt", "gblm", "scheduler"} <= {p.stem for p in RECIPES}


def test_validate_goes_through_all_and_tells_what_is_wrong(cli, tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('about = "fine"\nmethod = "wanda"\n')
    bad.write_text('method = "wanda"\n[[grid]]\nset = { lambada = 1 }\n')
    outcome = cli("validate", bad, good, code=2)
    assert "good.toml: fine" in outcome.stdout
    assert "bad.toml: wanda has no option 'lambada'" in outcome.stderr
    assert "cell 1" in outcome.stderr


def test_run_refuses_a_grid(cli, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(GRID)
    assert f"prunebench sweep {path}" in cli("run", "--recipe", path, code=2).output


def test_commands_of_a_grid_make_the_cells(cli, recipe):
    """What a sweep types means what the recipe says."""
    for cell in recipe(GRID).cells:
        shown = json.loads(cli("run", *cell.arguments, "--show-config", "--json").stdout)
        meant = dict(cell.values)
        # A command line has no types: the method's own options give them theirs.
        meant["method_options"] = {k: str(v) for k, v in meant.get("method_options", {}).items()}
        assert {k: v["value"] for k, v in shown.items()} == json.loads(json.dumps(meant))
