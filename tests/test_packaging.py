"""pyproject.toml declares what the package imports, and nothing that it does not."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# in an extra: imported where they are used
OPTIONAL = {"altair", "vl-convert-python", "submitit", "ray", "triton"}
FILES_ONLY = {"itables"}  # in an extra: its files are used, and it is not imported
NAMES = {"vl-convert": "vl-convert-python"}  # of distributions that are not called as their modules
NOT_IMPORTED = {"accelerate"}  # lm_eval.models.huggingface imports it at its top


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normalized(re.match(r"[\w.-]+", text)[0]) for text in requirements}


def imports() -> set[str]:
    names = set()
    for path in (ROOT / "prunebench").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    roots = {name.partition(".")[0] for name in names}
    modules = {normalized(name) for name in roots - set(sys.stdlib_module_names) - {"prunebench"}}
    return {NAMES.get(name, name) for name in modules}


def test_every_import_is_declared():
    assert imports() - OPTIONAL <= declared(PROJECT["dependencies"])


def test_optional_imports_are_in_an_extra():
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    assert declared(extras) >= OPTIONAL | FILES_ONLY
    assert imports() >= OPTIONAL


def test_every_dependency_is_imported():
    assert declared(PROJECT["dependencies"]) == imports() - OPTIONAL | NOT_IMPORTED


def test_lm_eval_needs_accelerate():
    from importlib.util import find_spec

    folder = Path(find_spec("lm_eval").origin).parent
    source = (folder / "models" / "huggingface.py").read_text("utf-8")
    assert re.search(r"^from accelerate import", source, re.MULTILINE)
