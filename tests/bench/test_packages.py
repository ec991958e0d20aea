"""The acceptance run on a GPU names what is missing at its start: all that its parts import."""

import ast
import sys

import pytest

from benchmarks.gpu_acceptance.parts.machine import NEEDED
from tests.test_layers import ROOT

REPOSITORY = ROOT.parent
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("prunebench", "benchmarks")
    for path in (REPOSITORY / folder).rglob("*.py")
}
INSIDE = (ast.Try, ast.If, ast.With)  # statements of a module whose bodies run when it is imported


def imports(nodes, *, functions):
    """Names that a module imports; those inside functions only if asked."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif isinstance(node, INSIDE) or functions:
            yield from imports(ast.iter_child_nodes(node), functions=functions)


def packages_of(start, *, functions):
    """Third-party packages that a module needs, with all modules of ours that these import."""
    seen, names = set(), set()
    todo = [(start, functions)]
    while todo:
        module, inside = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in imports(ast.parse(MODULES[module].read_text("utf-8")).body, functions=inside):
            parts = name.split(".")
            longer = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
            todo += [(each, False) for each in longer if each in MODULES]
            names.add(parts[0])
    return names - set(sys.stdlib_module_names) - {"prunebench", "benchmarks"}


GIVEN = {"torch", "triton"}  # without them there is no run
PARTS = sorted(name for name in MODULES if name.startswith("benchmarks.gpu_acceptance.parts."))


@pytest.mark.parametrize("part", PARTS)
def test_what_a_part_imports_is_named_at_the_start(part):
    assert packages_of(part, functions=True) - GIVEN <= set(NEEDED)


def test_the_list_is_not_checked_against_nothing():
    needed = packages_of("benchmarks.gpu_acceptance.parts.pruning", functions=True)
    assert {"greenlet", "pydantic", "platformdirs"} <= needed
