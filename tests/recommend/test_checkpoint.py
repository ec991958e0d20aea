"""`recommend --save` onto an earlier checkpoint: the same, another one, or one without its row."""

import json
import shutil

import pytest

from prunebench.recommend.candidates import Candidate
from prunebench.recommend.values import Value
from prunebench.results.store import ResultStore

SMALL = Candidate("magnitude 2:4", 0, {"method": "magnitude", "sparsity": "2:4"}, 1000)
LARGE = Candidate("magnitude 0.25", 0, {"method": "magnitude", "sparsity": "0.25"}, 2000)
VALUES = {"2:4": 1.8, "0.25": 1.2}


@pytest.fixture
def search(cli, ask, here, tmp_path, monkeypatch):
    """Search among `SMALL` and `LARGE` with the values above, and save."""
    import prunebench.recommend.search as module

    def value(result):
        return Value(VALUES[result.spec.sparsity], 1.0, 1.0, "p")

    def run(floor, *more, candidates=(SMALL, LARGE), code=0):
        monkeypatch.setattr(module, "perplexity_value", value)
        monkeypatch.setattr(module, "candidates_for", lambda goal, counts: candidates)
        words = ["--floor", floor, "--save", tmp_path / "out", *more]
        return cli(*ask, "-q", *words, code=code)

    return run


def saved(tmp_path):
    return json.loads((tmp_path / "out" / "prunebench.json").read_text())


def test_a_checkpoint_below_the_new_floor_is_refused_before_the_race(search, here, tmp_path):
    search("ppl=2x")
    assert saved(tmp_path)["spec"]["sparsity"] == "2:4"
    outcome = search("ppl=1.5x", code=2)
    assert "out exists already" in outcome.stderr and "--force" in outcome.stderr
    assert here.newest.ran == [] and "failed" not in outcome.output
    search("ppl=1.5x", "--force")
    assert saved(tmp_path)["spec"]["sparsity"] == "0.25"


def test_another_winner_than_the_saved_one_ends_the_command_and_is_not_dropped(search, tmp_path):
    search("ppl=2x", candidates=(LARGE,))
    outcome = search("ppl=2x", code=2)
    assert "out exists already" in outcome.stderr and "--force" in outcome.stderr
    assert "another checkpoint than this race saves" in outcome.stderr
    assert "failed" not in outcome.output and saved(tmp_path)["spec"]["sparsity"] == "0.25"
    search("ppl=2x", "--force")
    assert saved(tmp_path)["spec"]["sparsity"] == "2:4"


def test_a_saved_confirmation_without_its_row_brings_it(search, tmp_path):
    search("ppl=2x")
    shutil.rmtree(tmp_path / "results")
    outcome = search("ppl=2x")
    name = saved(tmp_path)["id"]
    assert "recommended: magnitude 2:4" in outcome.stdout and f"{name}.json" in outcome.stdout
    assert name in {row.id for row in ResultStore(tmp_path / "results").read()[0]}
