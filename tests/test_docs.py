"""The README cannot drift: every command, option, method and the example plug-in are checked."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from prunebench.calibration.texts import texts
from prunebench.cli import app
from prunebench.pruners import BUILTIN, METHODS
from prunebench.results.published import published_values
from prunebench.sweep.recipe import read_recipe
from prunebench.testing import check_pruner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
LINES = [line.strip() for line in README.splitlines() if line.startswith("    prunebench ")]


def command_of(words):
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
        command = getattr(command, "command", command)  # imported here
    return command


@pytest.mark.parametrize("line", LINES)
def test_commands_in_the_readme_exist_with_their_options(line):
    words = shlex.split(line.partition("#")[0])[1:]
    command = command_of(words)
    known = {flag for option in command.params for flag in [*option.opts, *option.secondary_opts]}
    flags = [word for word in words if word.startswith("-")]
    assert not getattr(command, "commands", None), f"{line} names a group, not a command"
    assert set(flags) <= known, line


def test_every_command_and_method_is_in_the_readme():
    for name, command in get_command(app).commands.items():
        for sub in getattr(command.command, "commands", [""]):
            assert f"`{f'{name} {sub}'.strip()}`" in README, f"{name} {sub}"
    for name in BUILTIN:
        assert f"| `{name}` |" in README, name


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert named <= targets
    assert {"demo", "test", "test-real", "check", "bench"} <= named


def test_the_example_method_passes_the_contract(tmp_path, monkeypatch):
    code = re.search(r"```python\n# my_method.py\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    pruner = METHODS.make(
        "my_method:Mine", METHODS.resolve_options("my_method:Mine", {"power": "0.7"}, seed=0)
    )
    assert pruner.power == 0.7
    assert [str(o) for o in check_pruner(pruner) if not o.passed] == []


def test_the_example_recipe_is_valid(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", README, re.DOTALL)[1])
    recipe = read_recipe(path, complete=True)
    assert (len(recipe.cells), len(recipe.expectations)) == (4, 2)


def test_every_recipe_and_the_number_of_published_values_are_in_the_readme():
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        assert f"| `recipes/{path.name}` |" in README
        assert f"reproduce-{path.stem}:" in (ROOT / "Makefile").read_text("utf-8")
    assert f"{len(published_values()):,} values of" in README


def test_no_placeholder_is_left():
    assert "@@" not in README
    assert "TODO" not in README


def test_texts_name_their_licence_and_where_they_come_from():
    for name, entry in texts().items():
        assert entry.licence and entry.about and entry.uses, name
        assert entry.hub or entry.file or (entry.url and entry.sha256), name
        assert not entry.hub or len(entry.revision) == 40, name


def test_the_shared_environment_is_pinned():
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins)
