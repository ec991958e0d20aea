"""Scripts for GPU machines say at their start which packages are missing."""

import ast
import json
import sys

import pytest

from benchmarks import packages
from benchmarks.scripts import maskllm_gpu
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


@pytest.mark.parametrize(
    "start", ["benchmarks.scripts.maskllm_gpu", "prunebench.run.pruning", "prunebench.pruners.alps"]
)
def test_what_pruning_imports_is_listed(start):
    assert packages_of(start, functions=True) <= set(packages.PRUNING)


def test_the_check_comes_before_the_first_import():
    assert not packages_of("benchmarks.scripts.maskllm_gpu", functions=False)


def test_what_packed_layers_import_is_listed():
    assert packages_of("benchmarks.scripts.gpu", functions=True) <= set(packages.PACKED)


def test_missing_packages_are_named_in_one_line_before_a_model_is_built(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["maskllm_gpu", "--shape", "tiny", "--device", "cpu"])
    monkeypatch.setattr(maskllm_gpu, "Bench", None)  # building anything would be an error
    for name in ("greenlet", "pydantic"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        maskllm_gpu.main()
    assert stopped.value.code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs greenlet, pydantic, not installed" in line


def test_nothing_is_said_where_all_is_there(capsys):
    packages.require_packages(packages.PRUNING, program="this test")
    assert capsys.readouterr().err == ""


def test_a_step_is_measured_at_one_window_and_at_all(monkeypatch, tmp_path):
    target = tmp_path / "steps.json"
    line = "maskllm_gpu --shape tiny --layers 1 --device cpu --tokens 16 --windows 3 --out"
    monkeypatch.setattr(sys, "argv", [*line.split(), str(target)])
    assert maskllm_gpu.main() == 0
    figures = {row["name"]: row for row in json.loads(target.read_text("utf-8"))["figures"]}
    for variant in maskllm_gpu.VARIANTS:
        for count in (1, 3):
            assert figures[f"maskllm-{variant}-ratio-{count}"]["limit"] is None  # not the real size
    assert figures["dense-step-3"]["unit"] == "s"
