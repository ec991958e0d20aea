"""Imports point down only (DESIGN section 3), and the rim stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "prunebench"

# Lower may not import higher. `models` reads the statistics of `calibration`, never the reverse.
LAYERS = {
    "sparsity": 0.0,
    "errors": -0.5,
    "files": 0.0,
    "progress": 0.0,
    "options": 0.5,
    "spec": 1.0,
    "wheels": 1.0,
    "processes": 1.0,
    "hub": 1.0,
    "hub_files": 1.1,
    "engines": 1.2,
    "results": 1.5,
    "calibration": 2.0,
    "models": 2.5,
    "registry": 2.8,
    "pruners": 3.0,
    "allocators": 3.1,
    "evaluate": 3.0,
    "sparse24": 3.0,
    "run_options": 3.4,
    "recipe": 3.5,
    "export": 4.0,
    "capacity": 3.6,
    "probe": 3.7,
    "dtype": 3.7,
    "forecast": 4.1,
    "resolve": 3.9,
    "prepare": 4.0,
    "place": 4.1,
    "record": 4.1,
    "scoring": 4.1,
    "execution": 4.1,
    "bench": 4.1,
    "run": 4.2,
    "sweep": 4.3,
    "testing": 5.0,
    "cli": 5.5,
    "__main__": 6.0,
    "__init__": 0.0,
}
LIGHT = (
    "registry",
    "sparsity",
    "errors",
    "files",
    "progress",
    "spec",
    "wheels",
    "results",
    "engines",
    "cli",
)
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "pandas", "numpy"}
FILES = sorted(ROOT.rglob("*.py"))


def component(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.Module, *, top_level: bool = False) -> set[str]:
    names = set()
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = component(path)
    assert own in LAYERS, f"{own} has no layer: give it one"
    for name in imported(ast.parse(path.read_text("utf-8"))):
        parts = name.split(".")
        if parts[0] != "prunebench" or len(parts) < 2 or parts[1] not in LAYERS:
            continue
        if parts[1] != own:
            assert LAYERS[parts[1]] < LAYERS[own], (
                f"{own} imports {parts[1]}, which is not below it"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_rim_imports_nothing_heavy(path):
    if component(path) in LIGHT:
        top = imported(ast.parse(path.read_text("utf-8")), top_level=True)
        assert not {name.split(".")[0] for name in top} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints(path):
    tree = ast.parse(path.read_text("utf-8"))
    calls = [
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    assert component(path) == "cli" or "print" not in calls


@pytest.mark.parametrize("arguments", [["--help"], ["list", "methods"], ["run", "--help"]])
def test_answers_without_torch(arguments):
    code = (
        "import sys\nfrom prunebench.cli import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
