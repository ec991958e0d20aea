"""docs/python.md is a notebook: every block of it runs, in order, in one namespace."""

import re
import sys
import types
from pathlib import Path

import pytest

import prunebench
from prunebench.testing import tiny_model
from tests.conftest import prose

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAMES = 'CALIBRATION, TEXT = "c4@wheel", "wiki@wheel"'


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Return a function that runs all blocks, in a folder with the committed results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    module = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)

    def run_blocks(blocks):
        for number, block in enumerate(blocks, 1):
            exec(compile(block, f"block {number} of docs/python.md", "exec"), vars(module))
        return module

    return run_blocks


@pytest.mark.slow
def test_every_block_runs_on_a_tiny_model(notebook, tmp_path, byte_tokenizer, monkeypatch, capsys):
    model = tiny_model("llama")
    model.config.max_position_embeddings = 512  # windows as long as those of the page
    model.save_pretrained(tmp_path / "tiny")
    byte_tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setitem(vars(prunebench), "fetch_model", lambda name: tmp_path / "tiny")
    for name, seed in (("calibration", 1), ("eval", 2)):
        (tmp_path / f"{name}.txt").write_text(prose(9_000, seed=seed), "utf-8")
    texts = 'CALIBRATION, TEXT = "file:calibration.txt", "file:eval.txt"'
    assert NAMES in BLOCKS[0]
    module = notebook([block.replace(NAMES, texts) for block in BLOCKS])
    printed = capsys.readouterr().out
    assert "PruningReport: wanda 2:4" in printed
    assert "did you mean 'wanda'?" in printed
    assert list(module.table.loc["wanda"].dropna())
    assert len(module.rows) == 3
    assert {"pruned", "methods.svg", "my-results"} <= {path.name for path in Path().iterdir()}


@pytest.mark.real
def test_every_block_runs_on_the_model_that_it_names(notebook):
    """With a quarter of the tokens, which is all that is changed."""
    fewer = [
        b.replace("4096", "1024").replace("calibration_samples=8", "calibration_samples=2")
        for b in BLOCKS
    ]
    assert fewer != BLOCKS
    module = notebook(fewer)
    assert module.dense.value < min(row["ppl"] for row in module.rows)
    assert module.result.scores[0].dense_value == module.dense.value


def test_the_page_names_every_member():
    for name in set(dir(prunebench)) - {"__version__", "PruningReport", "Perplexity"}:
        assert f"prunebench.{name}" in PAGE
