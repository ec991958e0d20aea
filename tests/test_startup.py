"""`--help` and `list` import only what they show; every command has the summary of its help."""

import json
import subprocess
import sys

import pytest
from typer.main import get_command

from prunebench.cli import app

HEAVY = {"torch", "transformers", "datasets", "lm_eval", "pandas", "numpy", "huggingface_hub"}
SHELL = {"", "cli", "cli.exit_codes", "cli.lazy", "errors", "progress"}
LISTING = SHELL | {"cli.listing", "cli.console", "cli.fitting", "registry"}
MAY_LOAD = {
    ("--help",): SHELL,
    ("--version",): SHELL,
    ("list", "methods"): LISTING | {"pruners"},
    ("list", "allocators"): LISTING | {"allocators"},
    ("run", "--help"): SHELL | {
        "cli.options", "cli.run", "options", "pruners", "registry", "run_options", "sparsity",
        "spec",
    },
}  # fmt: skip


def loaded_by(arguments):
    """Return the modules that are loaded when the command line has answered."""
    code = (
        "import json, sys\nfrom prunebench.cli import app\n"
        f"try:\n    app({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout
    return set(json.loads(done.stderr))


@pytest.mark.parametrize("arguments", MAY_LOAD, ids=" ".join)
def test_an_answer_loads_only_what_it_shows(arguments):
    modules = loaded_by(arguments)
    ours = {name.partition(".")[2] for name in modules if name.partition(".")[0] == "prunebench"}
    assert ours <= MAY_LOAD[arguments]
    assert not HEAVY & modules


def test_a_summary_is_the_first_paragraph_of_the_help():
    for name, stub in get_command(app).commands.items():
        paragraph = stub.command.help.split("\n\n")[0]
        assert stub.help == " ".join(paragraph.split()), name
        assert stub.command.name == name
