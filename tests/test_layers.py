"""Imports point down only, no circle anywhere, and the rim stays light."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "prunebench"

# Each level may import those before it, and nothing of its own level or after it.
LEVELS = [
    {"__init__", "errors", "progress"},
    {"options", "sparsity", "distributed", "files"},
    {"spec"},
    {"download", "registry", "results"},
    {"calibration"},
    {"models"},
    {"training"},
    {"evaluate", "pruners", "sparse24"},
    {"allocators", "recovery", "run_options"},
    {"checkpoints", "plugin", "testing"},
    {"bench", "run"},
    {"api", "sweep"},
    {"cli"},
    {"__main__"},
]
LEVEL_OF = {name: number for number, names in enumerate(LEVELS) for name in names}
LIGHT = {
    "errors", "progress", "options", "sparsity", "distributed", "files", "spec", "download",
    "registry", "results", "cli",
}  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "pandas", "numpy"}
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


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


def edges() -> dict[str, set[str]]:
    """Which modules each module imports, inside functions too."""
    return {
        name: {other for other in imported(ast.parse(path.read_text("utf-8"))) if other in MODULES}
        - {name, name.rpartition(".")[0]}  # a package's page says what it is, and imports lazily
        for name, path in MODULES.items()
        if name != "prunebench"  # its page too, see below
    }


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that are left when those that import nothing left are taken away."""
    left = {name: set(others) for name, others in graph.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    package = component(path)
    if path == ROOT / "__init__.py":
        return  # the API: see below
    assert package in LEVEL_OF, f"{package} has no level: give it one"
    for name in imported(ast.parse(path.read_text("utf-8"))):
        parts = name.split(".")
        if parts[0] != "prunebench" or len(parts) < 2 or parts[1] not in LEVEL_OF:
            continue
        if parts[1] != package:
            assert LEVEL_OF[parts[1]] < LEVEL_OF[package], (
                f"{package} imports {parts[1]}, which is not below it"
            )


def test_no_module_imports_itself_in_a_circle():
    assert circles(edges()) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]


def test_the_root_imports_the_api_for_type_checkers_only():
    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If) and node.body[1:]]
    assert ast.unparse(checked.test) == "TYPE_CHECKING"
    of_types = imported(ast.Module(checked.body, []))
    assert {"prunebench.api.pruning.prune", "prunebench.results.frame.load_results"} <= of_types
    rest = imported(ast.Module([node for node in tree.body if node is not checked], []))
    assert not {name for name in rest if name.startswith("prunebench")}


def test_the_root_stays_small():
    modules = [path for path in FILES if path.parent == ROOT and path.name != "__init__.py"]
    assert len(modules) <= 12


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
