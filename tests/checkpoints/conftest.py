"""Folders that runs and exports save, and a hub that takes them."""

import functools
import shutil
from pathlib import Path

import pytest

import prunebench.checkpoints.packed24 as packed_folder
import prunebench.models.verify as verify
from prunebench.models.safetensors_files import check_weight_files
from tests.factories import line_of_run
from tests.model_folders import MODELS, add_extras


@pytest.fixture(scope="session")
def built(tmp_path_factory, byte_tokenizer, eval_file):
    """Every model once: `model`, pruned as `ck`, packed as `packed`, its result in `results`."""
    from typer.testing import CliRunner

    from prunebench.cli import app

    @functools.cache
    def build(name):
        root = tmp_path_factory.mktemp(name)
        add_extras(MODELS[name](root / "model", byte_tokenizer))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PRUNEBENCH_CACHE", str(root / "cache"))
            run = line_of_run(root / "model", root / "ck", eval_file)
            for line in (
                [*run, "--results-dir", root / "results"],
                ["export", root / "ck", "-o", root / "packed", "--to", "packed24"],
            ):
                outcome = CliRunner().invoke(app, [str(word) for word in line])
                assert outcome.exit_code == 0, outcome.output
        return root

    return build


@pytest.fixture
def save(cli, built, eval_file):
    """Write `out` in one of the ways in which a folder is written."""

    def invoke(way, name, code=0):
        root = built(name)
        if way in ("resident", "disk"):
            line = line_of_run(root / "model", "out", eval_file, "--weights", way, "--force")
            return cli(*line, code=code)
        kind, _, strange = way.partition(" of ")
        source = root / ("packed" if kind == "dense" else "ck")
        if strange:  # nothing says how it was made
            shutil.copytree(source, "stranger")
            source = Path("stranger")
            (source / "prunebench.json").unlink()
        to = () if kind == "export" else ("--to", kind)
        return cli("export", source, *to, "-o", "out", "--force", code=code)

    return invoke


@pytest.fixture
def faulty(monkeypatch):
    """Let every writer make a fault: the folder is damaged after it was written."""

    def arm(damage):
        def check(folder):
            if folder.name.endswith(".part"):
                damage(folder)
            check_weight_files(folder)

        for module in (verify, packed_folder):
            monkeypatch.setattr(module, "check_weight_files", check)

    return arm


@pytest.fixture
def checkpoint(cli, tiny_run):
    cli(
        *tiny_run, "-m", "wanda", "--sparsity", "2:4", "--save-model", "ck", "--save-masks", "m.npz"
    )
    return Path("ck")
