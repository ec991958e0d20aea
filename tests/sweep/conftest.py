"""A small recipe that finishes in seconds."""

import pytest

from prunebench.sweep.recipe import read_recipe


@pytest.fixture
def recipe(tiny_folder, eval_file, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'model = "{tiny_folder}"\nppl = "file:{eval_file}"\nppl_seqlen = 64\n'
        '[[grid]]\nmethod = "magnitude"\nsparsity = [0.25, 0.5, 0.75]\n'
    )
    return read_recipe(path, complete=True)
