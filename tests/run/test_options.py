"""An option of a run is declared once, on its field; everything else is derived from it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from prunebench.errors import UsageError
from prunebench.options import REQUIRED, Option, options_of
from prunebench.results.selection import Selection
from prunebench.run_options import RUN_KEYS, RUN_OPTIONS
from prunebench.spec import RunSpec, Setup

# Adds a field to RunSpec before anything else of prunebench is imported, then runs commands.
WITH_ONE_MORE = """
import json, sys
from typing import Annotated
from pydantic import Field
import prunebench.spec as spec
from prunebench.options import Option

class More(spec.RunSpec):
    strength: Annotated[
        int, Field(ge=1), Option("How strong.", cell=True, shown=True, since=2)
    ] = 3

spec.RunSpec = More
from typer.testing import CliRunner
from prunebench.cli import app
runs = [CliRunner().invoke(app, words, env=env) for words, env in json.load(sys.stdin)]
json.dump([(run.exit_code, run.stdout, run.stderr) for run in runs], sys.stdout)
"""


@pytest.mark.slow
def test_a_field_of_a_subclass_is_an_option_everywhere(tiny_run, tmp_path):
    recipe, results = tmp_path / "r.toml", Path(tiny_run[-1])
    recipe.write_text('method = "magnitude"\nstrength = 5\n', "utf-8")
    given = ["--method", "magnitude"]
    show = ["run", "--show-config", "--json"]
    commands = [
        (["run", "--help"], {"COLUMNS": "100"}),
        ([*show, *given], {}),
        ([*show, *given, "--strength", "4"], {}),
        ([*show, *given], {"PRUNEBENCH_STRENGTH": "6"}),
        ([*show, "--recipe", str(recipe)], {}),
        (["run", *given, "--strength", "0"], {}),
        ([*tiny_run, *given], {}),
        ([*tiny_run, *given, "--strength", "7"], {}),
        (["compare", "strength=7", "--json", "--results-dir", str(results)], {}),
        (["compare", "--results-dir", str(results)], {}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITH_ONE_MORE],
        input=json.dumps(commands), capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    outcomes = json.loads(done.stdout)
    assert [code for code, *_ in outcomes] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 0], outcomes
    helped, *shown, wrong, _, _, selected, table = [out + err for _, out, err in outcomes]
    assert "How strong. (default: 3)" in " ".join(helped.replace("\u2502", " ").split())
    assert [tuple(json.loads(text)["strength"].values()) for text in shown] == [
        (3, "default"), (4, "flag"), (6, "environment"), (5, f"recipe {recipe}"),
    ]  # fmt: skip
    assert "--strength" in wrong
    cells = json.loads(selected)[0]["cells"]
    assert [cell["settings"]["strength"] for cell in cells] == [None, 7]  # the dense row, and it
    assert "strength" in table  # two rows differ in it, and only in it
    files = [json.loads(path.read_text("utf-8")) for path in results.rglob("*.json")]
    ids = {file["spec"].pop("strength"): file["spec_id"] for file in files}
    assert ids[3] == RunSpec(**files[0]["spec"]).spec_id != ids[7]  # old hashes stay true


def test_options_are_read_from_annotations():
    class Small(BaseModel):
        name: Annotated[str, Option("A name.")]
        size: Annotated[int | None, Field(ge=2), Option("A size.", default="all")] = None
        kind: Annotated[Literal["a", "b"] | None, Option("A kind.")] = "a"
        names: Annotated[tuple[str, ...], Option("Names.", env=False)] = ("x", "y")
        other: int = 3

    table = options_of(Small)
    assert list(table) == ["name", "size", "kind", "names"]
    assert table["name"].value is REQUIRED and table["name"].help_text == "A name."
    assert (table["size"].least, table["size"].nullable, table["size"].kind) == (2, True, int)
    assert table["size"].help_text == "A size. (default: all)"
    assert table["names"].help_text == "Names. (default: x,y)"
    assert table["names"].variable is None and table["names"].recipe_types == (str, list)
    assert table["kind"].variable == "PRUNEBENCH_KIND"
    with pytest.raises(UsageError, match="--kind 'c' is not known"):
        table["kind"].require("c")


def test_every_option_says_what_it_is():
    for option in RUN_OPTIONS.values():
        assert option.about.help.endswith("."), option.name
        assert option.about.requires is None or option.about.requires in RUN_OPTIONS
    for name, option in options_of(RunSpec).items():  # nothing of a spec is forgotten
        assert option.about.given or name.endswith(("_options", "_revision", "_origin", "_origins"))
    assert options_of(RunSpec).keys() == RunSpec.model_fields.keys()


def test_what_changes_no_number_splits_no_cell():
    assert not any(option.about.cell for option in options_of(Setup).values())
    assert RUN_KEYS.keys() >= {"method", "device", "weights", "activations", "set"}
    for key in ("method", "seed", "calibration_bos", "execute", "device"):
        Selection.parse([f"{key}=x"])
    with pytest.raises(UsageError, match="unknown selector"):
        Selection.parse(["ppl_seqlen=512"])
