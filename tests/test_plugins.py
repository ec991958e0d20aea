"""Methods from elsewhere: entry points, literal module:Class, and what happens when they break."""

import importlib
import sys
import textwrap

import pytest

from prunebench.errors import UsageError
from prunebench.pruners import METHODS

MODULE = """
from dataclasses import dataclass
from typing import Literal
import torch
from prunebench.pruners.keep import keep_rows
from prunebench.plugin import LayerPruner

@dataclass(frozen=True)
class Largest(LayerPruner):
    \"\"\"Prunes the largest weights: a bad idea.\"\"\"
    power: float = 1.0
    steps: int = 3
    loud: bool = False
    kind: Literal["a", "b"] = "a"
    cap: int | None = None

    def prune_weight(self, weight, stats, sparsity):
        return torch.where(keep_rows(-weight.abs() ** self.power, sparsity), weight, 0)

@dataclass(frozen=True)
class NotOne:
    pass

plain = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install fake distributions: call it with a name, module text and entry points."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name, text, points):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[prunebench.pruners]\n" + "\n".join(points) + "\n")
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


def test_an_entry_point_is_a_method(package, cli):
    package("mine_a", MODULE, ["largest = mine_a:Largest"])
    assert METHODS.plugins()["largest"].distribution == "mine_a 1.0"
    options = METHODS.resolve_options("largest", {"power": "2"}, seed=0)
    assert METHODS.make("largest", options).power == 2.0
    listed = cli("list", "methods").output
    assert "largest" in listed and "a bad idea" in listed and "mine_a 1.0" in listed
    assert "passes all" in cli("check", "largest").output


def test_a_plugin_that_raises_on_import_is_named_and_harms_nothing(package, cli, tiny_run):
    package("mine_b", "raise RuntimeError('boom at import')", ["broken = mine_b:X"])
    listed = cli("list", "methods").output
    assert "broken" in listed and "BROKEN" in listed and "boom at import" in listed
    assert "wanda" in listed
    outcome = cli(*tiny_run, "--method", "broken", code=2)
    assert "cannot be imported" in outcome.output and "boom at import" in outcome.output
    cli(*tiny_run, "--method", "magnitude")


def test_one_name_cannot_be_claimed_twice(package, cli):
    package("mine_c", MODULE, ["wanda = mine_c:Largest"])
    with pytest.raises(UsageError, match="two packages claim the method name 'wanda'") as error:
        METHODS.plugins()
    assert "mine_c 1.0" in error.value.where
    assert METHODS.find("wanda").target.startswith("prunebench.")  # built-ins go on working
    assert "two packages claim" in cli("list", "methods").output


def test_a_literal_module_and_class(package, cli, tiny_run):
    package("mine_d", MODULE, [])
    outcome = cli(*tiny_run, "--method", "mine_d:Largest", "--sparsity", "2:4", "--set", "steps=5")
    assert "mine_d:Largest 2:4" in outcome.output


def test_a_literal_class_in_the_working_folder(cli, tmp_path):
    (tmp_path / "work" / "right_here.py").write_text(MODULE)
    assert "passes all" in cli("check", "right_here:Largest", "--sparsity", "2:4").output


def test_check_says_what_failed(cli, tmp_path):
    (tmp_path / "work" / "lazy_one.py").write_text(
        MODULE.replace(
            "torch.where(keep_rows(-weight.abs() ** self.power, sparsity), weight, 0)", "weight"
        )
    )
    outcome = cli("check", "lazy_one:Largest", code=6)
    assert "FAILED  llama       reaches 0.5, joint" in outcome.output
    assert "was to be pruned to 0.5 and is not" in outcome.output
    assert "ok      llama       ratio 0 changes nothing" in outcome.output


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:X", "cannot be imported"),
        ("mine_e:Nothing", "cannot be imported"),
        ("mine_e:NotOne", "not a method"),
        ("mine_e:plain", "not a method"),
    ],
)
def test_what_is_no_pruner(package, name, says):
    package("mine_e", MODULE, [])
    with pytest.raises(UsageError, match=says):
        METHODS.load(name)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"powr": "2"}, "did you mean 'power'?"),
        ({"power": "much"}, "power='much' is not valid"),
        ({"steps": "2.5"}, "steps='2.5' is not valid"),
        ({"steps": True}, "steps=True is not valid"),
        ({"loud": "maybe"}, "loud='maybe' is not valid"),
        ({"kind": "c"}, "kind='c' is not valid\nit should be one of a, b"),
    ],
)
def test_wrong_options(package, given, says):
    package("mine_f", MODULE, [])
    with pytest.raises(UsageError) as error:
        METHODS.resolve_options("mine_f:Largest", given, seed=0)
    assert says in str(error.value)


def test_options_are_read_as_their_type(package):
    package("mine_g", MODULE, [])
    given = {"power": "2", "steps": 4, "loud": "yes", "kind": "b", "cap": "none"}
    options = METHODS.resolve_options("mine_g:Largest", given, seed=0)
    assert options == {"power": 2.0, "steps": 4, "loud": True, "kind": "b", "cap": None}
    assert METHODS.resolve_options("mine_g:Largest", {"cap": "7", "power": 3}, seed=0)["cap"] == 7
    assert METHODS.resolve_options("random", {}, seed=5) == {"seed": 5}
    assert METHODS.resolve_options("random", {"seed": "6"}, seed=5) == {"seed": 6}
